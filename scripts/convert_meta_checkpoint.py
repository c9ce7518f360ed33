"""Convert Meta's own files (params.json and consolidated.*.pth) of any LLaMA into a model folder."""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.errors import UserError, error_context, short
from lit_llama.formats.huggingface import check_known
from lit_llama.model import CONFIGS, LLAMA_3_SCALING, LLaMA, LLaMAConfig
from lit_llama.model_folder import check_complete, save_model_folder
from lit_llama.progress import progress
from lit_llama.prompt import find_template
from lit_llama.storage.checks import from_fields
from lit_llama.storage.files import check_apart, is_plain, read_file, read_json

import torch
from convert_hf_checkpoint import read_tokenizer
from torch import Tensor

NAMES = {
    "tok_embeddings.weight": "transformer.wte.weight",
    "norm.weight": "transformer.ln_f.scale",
    "output.weight": "lm_head.weight",
    "attention_norm.weight": "rms_1.scale",
    "attention.wq.weight": "attn.c_attn.weight",
    "attention.wk.weight": "attn.c_attn.weight",
    "attention.wv.weight": "attn.c_attn.weight",
    "attention.wo.weight": "attn.c_proj.weight",
    "ffn_norm.weight": "rms_2.scale",
    "feed_forward.w1.weight": "mlp.c_fc1.weight",
    "feed_forward.w3.weight": "mlp.c_fc2.weight",
    "feed_forward.w2.weight": "mlp.c_proj.weight",
}
QKV = ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight")  # one c_attn here
PARAMS = """dim n_layers n_heads n_kv_heads multiple_of ffn_dim_multiplier norm_eps rope_theta use_scaled_rope
vocab_size max_batch_size max_seq_len"""


def main(checkpoint_dir: Path, out_dir: Path, block_size: int | None = None, prompt_style: str | None = None) -> None:
    """Convert one model; the weights keep their dtype.

    Args:
        checkpoint_dir: The folder with params.json, consolidated.*.pth and, there or one folder up, tokenizer.model.
        out_dir: The model folder to write: lit-llama.pth, config.json and the tokenizer.
        block_size: The most tokens that the model takes, which the files do not say. By default as published.
        prompt_style: The chat template of an instruct model, which its files do not have: llama2, llama3 or a file.
    """
    check_apart(checkpoint_dir, out_dir)
    shards = find_shards(checkpoint_dir)
    config = read_config(checkpoint_dir, read_file(shards[0], check_tensors=False), len(shards))
    state = join_shards(shards, config)
    if "transformer.wte.weight" not in state:
        raise UserError(f"{shards[0]} has no tok_embeddings.weight; download it again")
    head = state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    tied = torch.equal(head, state["transformer.wte.weight"])
    config = replace(config, tie_embeddings=tied, block_size=block_size or published_length(config))
    check_complete(checkpoint_dir, state, config)
    files = read_tokenizer(checkpoint_dir, checkpoint_dir.parent)
    if not files:
        where = f"in {checkpoint_dir} or above"
        print(f"No tokenizer.model {where}: put one next to the converted weights", file=sys.stderr)
    template = find_template(prompt_style, None) if prompt_style else None
    save_model_folder(out_dir, state, config, files, template)
    print(f"Saved {out_dir}", file=sys.stderr)


def find_shards(folder: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, ...: each holds one model-parallel rank's part of every tensor."""
    shards = sorted(folder.glob("consolidated.*.pth"))
    if not shards:
        raise UserError(f"{folder} has no consolidated.*.pth; expected a folder in Meta's format")
    for number, shard in enumerate(shards):
        expected = folder / f"consolidated.{number:02}.pth"
        if shard != expected:
            raise UserError(f"{expected} is missing; download it")
    return shards


def read_config(folder: Path, shard: dict[str, Any], n_shards: int) -> LLaMAConfig:
    """The config, except what params.json does not tell: whether embeddings are tied, and block_size."""
    params = read_json(folder / "params.json")
    try:
        n_embd = params["dim"]
        rows, columns = shard["tok_embeddings.weight"].shape
        n_hidden = int((params.get("ffn_dim_multiplier") or 1) * int(8 * n_embd / 3))
        small = n_embd < 4096  # Llama 3.2, stretched further than 3.1
        scaling = replace(LLAMA_3_SCALING, factor=32.0 if small else 8.0) if params.get("use_scaled_rope") else None
        values = {
            "vocab_size": rows if columns < n_embd else rows * n_shards,  # Llama 3 splits rows, others columns
            "n_layer": params["n_layers"],
            "n_head": params["n_heads"],
            "n_embd": n_embd,
            "n_kv_head": params.get("n_kv_heads") or params["n_heads"],
            "n_hidden": math.ceil(n_hidden / params["multiple_of"]) * params["multiple_of"],
            "norm_eps": params["norm_eps"],
            "rope_base": params.get("rope_theta", 10000.0),
            "rope_scaling": scaling and asdict(scaling),
        }
        with error_context(folder / "params.json", "download it again"):
            check_known(params, {*PARAMS.split()})
            return from_fields(LLaMAConfig, values)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{folder} does not describe a LLaMA ({error!r}); download it again") from None


def published_length(config: LLaMAConfig) -> int:
    """How many tokens the published models take: LLaMA 1, Llama 2, Code Llama, Llama 3, and 3.1 and later."""
    if config.rope_scaling:
        return 131072
    if config.rope_base == 10000.0:
        is_llama_1 = config.norm_eps == 1e-6 or replace(config, block_size=2048) == CONFIGS["65B"]
        return 2048 if is_llama_1 else 4096
    return 8192 if config.rope_base == 500000.0 else 16384


def join_shards(shards: list[Path], config: LLaMAConfig) -> dict[str, Tensor]:
    """The state dict of LLaMA. Memory holds it and one shard at a time."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LLaMA(config).state_dict().items()}
    state: dict[str, Tensor] = {}
    names = read_file(shards[0], check_tensors=False).keys()
    for name in (f"layers.{i}.{layer}" for i in range(config.n_layer) for layer in QKV):
        if name not in names:  # check_complete would not see it, within c_attn
            raise UserError(f"{shards[0]} lacks {name}; download it again")
    for rank, path in enumerate(progress(shards, "Converting", "shard")):
        shard = read_file(path)
        if shard.keys() != names:
            raise UserError(f"{path} does not have the tensors that {shards[0].name} has; download both again")
        for name, part in shard.items():
            if name == "rope.freqs":  # a table that old files carry
                continue
            layer, block = name, ""
            if not is_plain(part) or not part.is_floating_point():
                raise UserError(f"{path} holds {short(name)} as {short(part)}, expected floating-point numbers")
            if name.startswith("layers.") and name.count(".") > 2:
                _, number, layer = name.split(".", 2)
                block = f"transformer.h.{number}."
            ours = block + NAMES.get(layer, "")
            if ours not in shapes:
                raise UserError(f"{path} has a tensor {name}, which a LLaMA of {config.n_layer} layers does not have")
            if ours not in state:
                state[ours] = torch.empty(shapes[ours], dtype=part.dtype)
            whole = state[ours]
            if layer in QKV:
                whole = whole.split(config.qkv_sizes)[QKV.index(layer)]
            place(path, name, part, whole, rank, len(shards))
    return state


def place(path: Path, name: str, part: Tensor, whole: Tensor, rank: int, n_shards: int) -> None:
    """Copy one rank's part of a tensor to where it belongs in the whole.

    Along a dimension in which it is smaller than the whole, the parts follow one another in the order of the ranks;
    where they would add up to more (few heads for keys and values on many ranks), neighbours hold the same.
    """
    if part.dim() != whole.dim() or part.numel() == 0:
        raise UserError(f"{path}: {name} is {short(part)}, expected {whole.dim()} dimensions; download it again")
    for dim, (size, n) in enumerate(zip(whole.shape, part.shape, strict=True)):
        if n * n_shards < size or n > size:
            raise UserError(
                f"{path}: {n_shards} parts of {name} {tuple(part.shape)} do not make one of the model; "
                "download the consolidated.*.pth that is missing, or params.json again"
            )
        whole = whole.narrow(dim, rank * size // n_shards // n * n, n)
    whole.copy_(part)


if __name__ == "__main__":
    run(main)
