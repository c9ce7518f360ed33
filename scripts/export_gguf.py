"""Export a model folder, or a LoRA file alone, to GGUF for llama.cpp, with a Modelfile for Ollama."""

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.finetuned import read_finetuned
from lit_llama.formats.huggingface import NAMES
from lit_llama.formats.peft import parts
from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMAConfig
from lit_llama.model_folder import find_model, load_model, own_template, read_config
from lit_llama.progress import progress
from lit_llama.prompt import find_template, stop_ids
from lit_llama.storage.files import check_apart, check_finite, read_file, replacing_folder, write_file
from lit_llama.tokenizer import CONTROL, USER_DEFINED, Tokenizer, find_tokenizer

import numpy as np
from convert_gguf_checkpoint import (
    CHAT_TEMPLATE,
    ENDS,
    FIELDS,
    NORMAL,
    ROPE_FREQS,
    TENSOR_NAMES,
    UNUSED,
    rope_divisors,
)
from export_hf import portable
from modelfile import modelfile
from tokenizer_files import PRE_TOKENIZERS, TEMPLATE_NAME, byte_level_bpe
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

try:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quant_shape_to_byte_shape, quantize
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyrefly: ignore
except ImportError:
    sys.exit("error: GGUF files need more libraries; run: pip install -e '.[gguf]'")

FILES = r"{}-(F32|F16|Q8_0)\.gguf|Modelfile|chat_template\.jinja"
FILE_TYPES = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}
MODULE_NAMES = {  # of what PEFT adds LoRA to
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    **{NAMES[ours].removesuffix(".weight"): theirs for theirs, ours in TENSOR_NAMES.items()},
}
Q8_0_BLOCK = 32  # numbers that share a scale


class Content(NamedTuple):
    """What a GGUF holds, and the template that goes with it."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    template: str | None


def main(
    out_dir: Path,
    checkpoint_path: Path | None = None,
    tokenizer_path: Path | None = None,
    lora_path: Path | None = None,
    lora_alpha: float | None = None,
    base_model: str | None = None,
    dtype: Literal["F32", "F16", "Q8_0"] = "F16",
    prompt_style: str | None = None,
    force: bool = False,
) -> None:
    """Write model-F16.gguf or, of a LoRA file, lora-F16.gguf and chat_template.jinja; and a Modelfile.

    Args:
        out_dir: The folder to write.
        checkpoint_path: The model: a base one, one that finetune_full.py wrote, or one that merge_lora.py wrote.
            Default: checkpoints/lit-llama/7B, or else the model written last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        lora_path: A file that finetune_lora.py wrote, to export it alone; the checkpoint is then that of its base.
        lora_alpha: Only for a file of the archived Lit-LLaMA, which did not store it.
        base_model: With a LoRA file, its base for the Modelfile: a GGUF, or a name that Ollama knows.
        dtype: Type of the matrices. Q8_0 is 8 bits with a scale for each 32 numbers; rows that do not divide by 32
            are F16.
        prompt_style: The chat template: own (that of the LoRA file or the model: the default), alpaca, chatml or
            another style of lit_llama/prompt.py, or a file that holds one.
        force: Use the LoRA file even if it was trained on a different base model of the same shape.
    """
    checkpoint_path = find_model(checkpoint_path)
    if base_model and lora_path is None:
        raise UserError("--base_model goes with --lora_path: a whole model has no other base")
    check_apart(checkpoint_path.parent, out_dir)
    tokenizer = find_tokenizer(checkpoint_path, tokenizer_path)
    if lora_path is None:
        content = read_model(checkpoint_path, tokenizer, prompt_style)
        model, adapter = f"./model-{dtype}.gguf", None
    elif base_model is None:
        raise UserError("a Modelfile names the base of a LoRA; add --base_model, a GGUF or a name that Ollama knows")
    else:
        content = read_lora(lora_path, checkpoint_path, lora_alpha, force)
        content = content._replace(template=find_template(prompt_style, content.template))
        model, adapter = base_model, f"./lora-{dtype}.gguf"
        if (path := Path(base_model).expanduser()).is_file():  # a Modelfile names it from its own folder on
            model = os.path.join(".", os.path.relpath(path.resolve(), out_dir.resolve()))
    ollama = modelfile(model, adapter, content.template, tokenizer)
    with replacing_folder(out_dir, FILES.format("lora" if adapter else "model")) as part:
        write_gguf(part / (adapter or model), content, dtype)
        write_file(part / "Modelfile", ollama)
        if adapter and content.template:
            write_file(part / TEMPLATE_NAME, portable(content.template, tokenizer))
    print(f"Saved {out_dir}", file=sys.stderr)


def read_model(path: Path, tokenizer: Tokenizer, style: str | None) -> Content:
    own, model = own_template(path), load_model(path)
    template = find_template(style, own) if style or own else None
    tokenizer.check_fits(model.config.vocab_size)
    name = {"general.name": path.absolute().parent.name}
    stops = stop_ids(template, tokenizer) if template else ()
    metadata = name | model_metadata(model.config) | tokenizer_metadata(tokenizer, model.config.vocab_size, stops)
    if template:
        metadata[CHAT_TEMPLATE] = portable(template, tokenizer)
        if not any(name and name in template for name in ("bos_token", tokenizer.names.get("bos_token"))):
            metadata["tokenizer.ggml.add_bos_token"] = False  # llama.cpp would put one before the template
    return Content(metadata, dict(to_gguf(model.state_dict(), model.config)), template)


def read_lora(path: Path, base_path: Path, alpha: float | None, force: bool) -> Content:
    base = read_config(base_path, read_file(base_path))
    lora = read_finetuned(path, "lora", alpha, base_path, force)
    metadata = {"general.name": lora.path.stem, "general.type": "adapter", "adapter.type": "lora"}
    metadata |= {"adapter.lora.alpha": float(lora.config.alpha)}
    return Content(metadata, dict(lora_to_gguf(lora.tensors_for(base), base, lora.config)), lora.prompt_style)


def write_gguf(path: Path, content: Content, dtype: str) -> None:
    """Write one file; memory holds one converted tensor at a time."""
    check_finite(path, content.tensors)
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "Q8_0":
        writer.add_quantization_version(2)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in content.metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    types = {name: stored_type(tensor, dtype) for name, tensor in content.tensors.items()}
    for name, tensor in content.tensors.items():
        shape = quant_shape_to_byte_shape(tensor.shape, types[name])
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), int(np.prod(shape)), types[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in progress(content.tensors.items(), "Exporting", "tensor"):
            writer.write_tensor_data(converted(path, name, tensor, types[name]))
    finally:
        writer.close()


def stored_type(tensor: Tensor, dtype: str) -> GGMLQuantizationType:
    """Matrices are stored as asked; vectors, which are small and which llama.cpp wants exact, in float32."""
    if tensor.ndim == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType["F16" if dtype == "Q8_0" and tensor.size(-1) % Q8_0_BLOCK else dtype]


def converted(path: Path, name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The numbers of a tensor as they are stored."""
    if kind == GGMLQuantizationType.F16 and tensor.abs().max() > np.finfo(np.float16).max:
        raise UserError(f"{path} was not written: {name} has numbers beyond 65504; use --dtype F32")
    return quantize(tensor.detach().float().contiguous().numpy(), kind)


def to_gguf(state: Mapping[str, Tensor], config: LLaMAConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by llama.cpp's names. It takes the embedding for the output if there is none."""
    names = {ours: theirs for theirs, ours in TENSOR_NAMES.items()}
    for name, tensor in state.items():
        layer, block = name, ""
        if name.startswith("transformer.h."):
            _, _, number, layer = name.split(".", 3)
            block = f"blk.{number}."
        if layer == "attn.c_attn.weight":
            for letter, rows in zip("qkv", tensor.split(config.qkv_sizes), strict=True):
                yield f"{block}attn_{letter}.weight", rows
        elif layer != "lm_head.weight" or not config.tie_embeddings:
            yield f"{block}{names[layer]}.weight", tensor
    if config.rope_scaling and config.rope_scaling.original_block_size:
        yield ROPE_FREQS, rope_divisors(config)


def model_metadata(config: LLaMAConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields |= {"general.type": "model", "llama.vocab_size": config.vocab_size}
    fields |= {"llama.rope.dimension_count": config.head_size, "llama.rope.freq_base": float(config.rope_base)}
    if (scaling := config.rope_scaling) and not scaling.original_block_size:
        fields |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": scaling.factor}
    return fields


def lora_to_gguf(state: Mapping[str, Tensor], base: LLaMAConfig, lora: LoRAConfig) -> Iterator[tuple[str, Tensor]]:
    """A and B of every matrix that has an update, by llama.cpp's names."""
    if "head" in lora.targets and base.tie_embeddings:
        raise UserError(
            "llama.cpp cannot add LoRA to a head that shares the embedding's weight; merge it (merge_lora.py) and "
            "export the model"
        )
    for module, layer, rows_A, rows_B, _ in parts(base, lora):
        number, _, name = module.removeprefix("model.layers.").partition(".")
        theirs = f"blk.{number}.{MODULE_NAMES[name]}" if name else MODULE_NAMES[module]
        yield f"{theirs}.weight.lora_a", state[f"{layer}.lora_A"][rows_A]  # (r, in)
        yield f"{theirs}.weight.lora_b", state[f"{layer}.lora_B"][rows_B]  # (out, r)


def tokenizer_metadata(tokenizer: Tokenizer, n_rows: int, stops: Collection[int] = ()) -> dict[str, Any]:
    """The metadata by which llama.cpp gives the same ids, for a model of so many rows whose answers end at `stops`."""
    write = bpe_to_gguf if tokenizer.path.suffix == ".json" else sentencepiece_to_gguf
    bos = tokenizer.controls.get(tokenizer.names.get("bos_token", ""), tokenizer.eos_id)  # else llama.cpp assumes one
    ends = [tokenizer.eos_id, *sorted({*stops, *tokenizer.end_ids} - {tokenizer.eos_id})]
    return {
        **write(tokenizer.path, next(iter(tokenizer.files().values())), n_rows),
        **dict(zip(ENDS, ends, strict=False)),
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.add_bos_token": tokenizer.bos_id is not None,
        "tokenizer.ggml.add_eos_token": False,
    }


def sentencepiece_to_gguf(path: Path, content: bytes, n_rows: int) -> dict[str, Any]:
    model = ModelProto.FromString(content)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE or normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(f"{path} changes text or is not BPE, which llama.cpp does not do; expected one as LLaMA's")
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces[:n_rows]]
    pieces += [(f"[PAD{i}]", -1000.0, UNUSED) for i in range(len(pieces), n_rows)]
    tokens, scores, types = zip(*pieces, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.unknown_token_id": trainer.unk_id,
        "tokenizer.ggml.add_space_prefix": normalizer.add_dummy_prefix,
    }


def bpe_to_gguf(path: Path, content: bytes, n_rows: int) -> dict[str, Any]:
    fields = json.loads(HFTokenizer.from_buffer(content).to_str())
    if fields["model"].get("byte_fallback"):
        remedy = "convert the model again with its tokenizer.model in place of the tokenizer.json"
        raise UserError(f"{path} is SentencePiece's without the scores of its pieces, which a GGUF needs; {remedy}")
    ways = ((pre, json.loads(byte_level_bpe(pre, [], [], [], {}, False)["tokenizer.json"])) for pre in PRE_TOKENIZERS)
    pre = next((pre for pre, example in ways if how_cut(example) == how_cut(fields)), None)
    if not pre:
        known = f"byte-level BPE as of {', '.join(PRE_TOKENIZERS)}, or SentencePiece's tokenizer.model"
        raise UserError(f"{path} cuts text in a way for which no name of llama.cpp is known; expected {known}")
    added = {token["id"]: token for token in fields["added_tokens"]}
    texts = {i: token for token, i in fields["model"]["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    types = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(n_rows)],
        "tokenizer.ggml.token_type": [types.get(i, NORMAL if i in texts else UNUSED) for i in range(n_rows)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in fields["model"]["merges"]],
    }


def how_cut(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """How a tokenizer.json cuts text and merges, without what does not change the tokens."""
    model, cut = fields["model"], fields["pre_tokenizer"] or {}
    steps = [{**step, "trim_offsets": None} for step in cut.get("pretokenizers", [cut])]
    return model["type"], model.get("ignore_merges"), fields["normalizer"], steps


if __name__ == "__main__":
    run(main)
