"""Convert a Hugging Face model folder (config.json and .safetensors or .bin shards) into a model folder."""

import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from lit_llama.cli import run
from lit_llama.errors import UserError, check_type, short
from lit_llama.formats.huggingface import FIELDS, NAMES, QKV, SCALING, Expected, check_known, pairs_from_halves
from lit_llama.model import LLaMAConfig
from lit_llama.model_folder import check_complete, load_model, own_template, save_model_folder, suggest_script
from lit_llama.progress import progress, say
from lit_llama.prompt import Message, encode
from lit_llama.storage.checks import from_fields
from lit_llama.storage.files import check_apart, is_plain, read_file, read_json, read_safetensors
from lit_llama.tokenizer import CONFIG_NAME, Tokenizer, find_tokenizer, tokenizer_in

import torch
from tokenizer_files import from_tiktoken, is_tiktoken, read_chat_template, report_missing, tried
from torch import Tensor

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each may be one file or have an index; in transformers' order
OTHERS = "max_sequence_length num_key_value_heads head_dim rope_theta rope_scaling rope_parameters dtype torch_dtype"
EXPECTED: Expected = {
    "model_type": (("llama",), "expected 'llama'; get another model"),
    "architectures": ((None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"]), "it is not a language model with a head"),
    "quantization_config": ((None, {}), "its weights are quantised; get the model that it was made from"),
    "hidden_act": ((None, "silu", "swish"), "LLaMA's MLP uses silu"),
    "attention_bias": ((None, False), "LLaMA has no biases"),
    "mlp_bias": ((None, False), "LLaMA has no biases"),
    "partial_rotary_factor": ((None, 1), "LLaMA rotates all channels of a head"),
    "sliding_window": ((None,), "LLaMA attends to all earlier tokens"),
}
HARMLESS = """attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample early_stopping eos_token_id
finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder
is_llama_config label2id length_penalty loss_type max_length min_length num_beam_groups num_beams num_labels
num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
task_specific_params temperature tokenizer_class top_k top_p torchscript transformers.js_config transformers_version
typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache"""
TEXTS = [
    "Hello, my name is",
    "  two  spaces\n\tand a tab",
    "1234567 is 7 digits",
    "naïve café, 東京 and 🙂",
    "<s>[INST]</s>",
]


def main(
    checkpoint_dir: Path,
    out_dir: Path,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    verify: bool = False,
) -> None:
    """Convert one model of the llama architecture.

    Args:
        checkpoint_dir: The folder that was downloaded.
        out_dir: The model folder to write: lit-llama.pth, config.json (with the chat template) and the tokenizer.
        dtype: The type to store the weights in. By default as they are.
        verify: Compare logits and token ids with those of transformers, which must be installed.
    """
    check_apart(checkpoint_dir, out_dir)
    source = checkpoint_dir / "config.json"
    if not source.is_file():
        what = suggest_script(checkpoint_dir) or "; give a folder in Hugging Face's format"
        raise UserError(f"{checkpoint_dir} has no config.json{what}")
    try:
        config = config_from_hf(read_json(source))
        source = checkpoint_dir
        state = from_hf(read_shards(checkpoint_dir), config, dtype and getattr(torch, dtype))
    except UserError as error:
        raise UserError(f"could not convert {source}: {error}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{checkpoint_dir}/config.json does not describe a LLaMA ({error!r}); get it again") from None
    try:
        check_complete(checkpoint_dir, state, config)
    except UserError as error:
        fields = "vocab_size, num_hidden_layers and intermediate_size"
        raise UserError(f"{error}; is its config.json ({fields}) that of its weights?") from None
    if config.tie_embeddings and not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
        found = "The head differs from the embedding, though tie_word_embeddings is true"
        print(f"{found}: they are stored separately", file=sys.stderr)
        config = replace(config, tie_embeddings=False)
    files = read_tokenizer(checkpoint_dir)
    if not files:
        print(f"No tokenizer in {checkpoint_dir}: put one next to the converted weights", file=sys.stderr)
    save_model_folder(out_dir, state, config, files, tried(read_chat_template(checkpoint_dir)))
    print(f"Saved {out_dir}", file=sys.stderr)
    if files:
        report_missing(out_dir, config.vocab_size)
    if verify:
        compare(checkpoint_dir, out_dir, bool(files))


def read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of all shards, one shard at a time."""
    shards = find_shards(folder)
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard} is missing; download it")
    seen: dict[str, Path] = {}
    for shard in progress(shards, "Converting", "shard"):
        for name, tensor in read_bin(shard).items() if shard.suffix == ".bin" else read_safetensors(shard):
            if name in seen:
                raise UserError(f"{seen[name]} and {shard.name} both have {name}; move one of them away")
            seen[name] = shard
            yield name, tensor


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, also before PyTorch 1.6."""
    try:
        if not zipfile.is_zipfile(path):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # of many kinds, if it is neither
        pass
    return read_file(path)


def find_shards(folder: Path) -> list[Path]:
    """The files of weights that transformers would load or, where it finds none, those that look like shards."""
    for name in WEIGHTS:
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return [file]
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise UserError(f"{index} names a file that is not in its folder, {short(outside[0])}; get it again")
            return [folder / name for name in names]
    others = ("adapter_", "consolidated")
    shards = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(others)]
    shards = shards or sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        what = suggest_script(folder) or "; download them"
        raise UserError(f"there are no .safetensors or pytorch_model*.bin files{what}")
    return shards


@torch.inference_mode()
def compare(theirs_dir: Path, ours_dir: Path, has_tokenizer: bool) -> None:
    """Print how far logits and token ids are from those that transformers computes, in float32."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(
            "the result was saved, but --verify needs transformers; run: pip install transformers"
        ) from None
    ours = load_model(ours_dir, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(theirs_dir, torch_dtype=torch.float32).eval()
    idx = torch.arange(64)[None] % ours.config.vocab_size  # (1, T)
    logits = theirs(idx).logits
    difference = (ours(idx) - logits).abs().max()
    largest = f"the largest logit is {logits.abs().max():.1e}"
    print(f"Logits differ from transformers' by at most {difference:.1e} ({largest})", file=sys.stderr)
    if not has_tokenizer:
        return
    tokenizer, other = find_tokenizer(ours_dir, ours_dir), cast(Any, AutoTokenizer.from_pretrained(theirs_dir))
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    wrong = [text for text in TEXTS if tokenizer.encode(text, bos=False) != other(text, **plain)["input_ids"]]
    print(f"Token ids differ for {len(wrong)} of {len(TEXTS)} texts", *wrong, sep="\n  ", file=sys.stderr)
    template = own_template(ours_dir / "lit-llama.pth")
    if template and other.chat_template:
        question = "Why is the sky blue?"
        turn = [{"role": "user", "content": question}]
        text = other.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        theirs_ids = other(text, add_special_tokens=False)["input_ids"]
        same = encode(template, [Message("user", question)], tokenizer).ids == theirs_ids
        found = "the same token ids as" if same else "other token ids than"
        print(f"A question in the chat template has {found} in transformers", file=sys.stderr)


def config_from_hf(fields: Mapping[str, Any]) -> LLaMAConfig:
    """The configuration from the fields of a config.json, as transformers 4 or 5 writes them.

    Raises:
        UserError: if a field says what LLaMA does not do, or may say so: one that is not known, and set.
    """
    check_known(fields, {*FIELDS, *OTHERS.split(), *HARMLESS.split()}, EXPECTED)
    fields = {"max_position_embeddings": fields.get("max_sequence_length", 2048), **fields}
    values = {ours: fields.get(theirs, default) for theirs, (ours, default) in FIELDS.items()}
    for theirs, (ours, default) in FIELDS.items():
        check_type(theirs, values[ours], type(default))
    values["n_kv_head"] = fields.get("num_key_value_heads") or values["n_head"]
    head_size = fields.get("head_dim") or values["n_embd"] // max(values["n_head"], 1)
    if head_size * values["n_head"] != values["n_embd"]:
        raise UserError(
            f"head_dim is {short(head_size)}, but {values['n_head']} heads must make up {values['n_embd']} channels"
        )
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    check_type("rope_scaling", rope, Mapping)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SCALING:
        raise UserError(f"rope_scaling is of type {kind!r}, expected {', '.join(SCALING)}; get another model")
    names = SCALING[kind]
    check_known(rope, {"rope_type", "type", "rope_theta", *SCALING["llama3"]}, whose="rope_scaling's ")
    if missing := [name for name in names if name not in rope]:
        raise UserError(f"rope_scaling does not have {missing[0]}")
    values["rope_scaling"] = {ours: rope[theirs] for theirs, ours in names.items()} or None
    values["rope_base"] = rope.get("rope_theta") or fields.get("rope_theta") or 10000.0
    return from_fields(LLaMAConfig, values)


def from_hf(
    tensors: Iterable[tuple[str, Tensor]], config: LLaMAConfig, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state dict of LLaMA from the named tensors of a LlamaForCausalLM, which may come in any order.

    Args:
        config: if it ties head and embedding, a head may be missing; one that is there is not compared.
        dtype: None for the weights' own, which is float32 if they have several.
    """
    names = {theirs: ours for ours, theirs in NAMES.items()}
    state: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if not is_plain(tensor) or not tensor.is_floating_point() or tensor.itemsize == 1:
            raise UserError(f"{short(name)} is {short(tensor)}, expected float32, bfloat16 or float16")
        tensor = tensor.to(dtype or tensor.dtype, copy=True)  # a mapped file could not be let go
        layer, prefix, number = name, "", ""
        if name.startswith("model.layers.") and name.count(".") > 2:
            number, layer = name.removeprefix("model.layers.").split(".", 1)
            prefix = f"transformer.h.{number}."
        if layer in names:
            state[prefix + names[layer]] = tensor
        elif layer in QKV:
            parts = qkv.setdefault(prefix, {})
            parts[QKV[layer]] = tensor
            if len(parts) == 3:
                del qkv[prefix]
                if any(parts[x].shape != (n, config.n_embd) for x, n in zip("qkv", config.qkv_sizes, strict=True)):
                    raise UserError(f"q, k or v of layer {number} has a shape that config.json does not imply")
                q, k = pairs_from_halves(parts["q"], config.n_head), pairs_from_halves(parts["k"], config.n_kv_head)
                state[f"{prefix}attn.c_attn.weight"] = torch.cat((q, k, parts["v"]))
        elif not layer.endswith("rotary_emb.inv_freq"):  # old files carry these tables
            raise UserError(f"there is a tensor {name}, which a LLaMA does not have")
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1 or torch.float64 in dtypes:  # a model has one
        state = {name: tensor.float() for name, tensor in state.items()}
    if config.tie_embeddings and "transformer.wte.weight" in state:
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    return state


def read_tokenizer(*folders: Path) -> dict[str, bytes | str]:
    """The tokenizer's files in the first folder that has one; none if none has."""
    for path in filter(None, map(tokenizer_in, folders)):
        if is_tiktoken(path):
            return from_tiktoken(path)
        check_spaces(path)
        return dict(Tokenizer(path).files())
    return {}


def check_spaces(path: Path) -> None:
    """Say if transformers, by its own settings, would put other spaces before a text than this file does."""
    config, other = map(path.with_name, (CONFIG_NAME, "tokenizer.json"))
    if path == other or other.is_file() or not config.is_file():  # the latter has its spaces in it
        return
    fields = read_json(config)
    if names := [name for name in ("legacy", "add_prefix_space") if fields.get(name) is False]:
        remedy = f"save one by AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained(...)"
        say(f"warning: {config} has {names[0]}: false, which takes a tokenizer.json; for the same ids, {remedy}")


if __name__ == "__main__":
    run(main)
