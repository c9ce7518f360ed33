"""GGUF, the format of llama.cpp: its names for our weights, and what it says of a model, a LoRA and a tokenizer.

llama.cpp orders the rows of queries and keys as Meta does, which is our order, too.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.formats.huggingface import NAMES
from lit_llama.formats.peft import parts
from lit_llama.formats.tokenizers import LLAMA_3, PRE_TOKENIZERS, byte_level_bpe
from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMAConfig, stretch_frequencies
from lit_llama.tokenizer import CONTROL, ENDS_NAME, USER_DEFINED, Tokenizer

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

TENSOR_NAMES = {
    "token_embd": "transformer.wte.weight",
    "output_norm": "transformer.ln_f.scale",
    "output": "lm_head.weight",
    "attn_norm": "rms_1.scale",
    "attn_output": "attn.c_proj.weight",
    "ffn_norm": "rms_2.scale",
    "ffn_gate": "mlp.c_fc1.weight",
    "ffn_up": "mlp.c_fc2.weight",
    "ffn_down": "mlp.c_proj.weight",
}
MODULE_NAMES = {  # of what PEFT adds LoRA to
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    **{NAMES[ours].removesuffix(".weight"): theirs for theirs, ours in TENSOR_NAMES.items()},
}
FIELDS = {  # of LLaMAConfig
    "block_size": "llama.context_length",
    "n_layer": "llama.block_count",
    "n_head": "llama.attention.head_count",
    "n_embd": "llama.embedding_length",
    "n_kv_head": "llama.attention.head_count_kv",
    "n_hidden": "llama.feed_forward_length",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_base": "llama.rope.freq_base",
}
ROPE_FREQS = "rope_freqs.weight"
ENDS = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]  # the ends of an answer
NORMAL, UNUSED, BYTE = 1, 5, 6  # more of SentencePiece's types, which GGUF has taken over for all tokenizers
CHAT_TEMPLATE = "tokenizer.chat_template"


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


def rope_divisors(config: LLaMAConfig) -> Tensor:
    """By what the scaling of Llama 3.1 divides each rotary frequency, which is all that llama.cpp keeps of it."""
    freqs = config.rope_base ** -(torch.arange(0, config.head_size, 2) / config.head_size)  # (hs / 2,)
    return freqs / stretch_frequencies(freqs, config.rope_scaling) if config.rope_scaling else torch.ones_like(freqs)


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


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes | str]:
    """The tokenizer that the metadata of the GGUF at `path` describes, as files by their names."""
    ends = [metadata[name] for name in ENDS if name in metadata]
    files = {ENDS_NAME: json.dumps({"eos_token_id": ends})} if len({*ends}) > 1 else {}
    model, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    if model == "llama":
        return {"tokenizer.model": sentencepiece_from_gguf(path, metadata), **files}
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        known = f"SentencePiece (llama) and byte-level BPE (gpt2: {', '.join(PRE_TOKENIZERS)}) are"
        raise UserError(f"the tokenizer of {path} ({model}, {pre}) is not supported; {known}")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    kinds = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    added = [AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in kinds]
    names = {"eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]]}
    if "tokenizer.ggml.bos_token_id" in metadata:
        names["bos_token"] = tokens[metadata["tokenizer.ggml.bos_token_id"]]
    begins = metadata.get("tokenizer.ggml.add_bos_token", PRE_TOKENIZERS[pre] is LLAMA_3)  # older files do not say
    return byte_level_bpe(pre, tokens, merges, added, names, begins) | files


def sentencepiece_from_gguf(path: Path, metadata: Mapping[str, Any]) -> bytes:
    """A `tokenizer.model` with the same pieces, scores and settings as the one that the GGUF was made from."""
    model = model_proto(path)()
    tokens, types = metadata["tokenizer.ggml.tokens"], list(metadata["tokenizer.ggml.token_type"])
    has_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
    unk = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    bos = metadata.get("tokenizer.ggml.bos_token_id", 1) if has_bos else unk
    eos = metadata.get("tokenizer.ggml.eos_token_id", 2)
    for token_id in (bos, eos) if has_bos else (eos,):
        types[token_id] = CONTROL  # SentencePiece knows a bos or eos, which it finds by its name, only as this
    for token, score, kind in zip(tokens, metadata["tokenizer.ggml.scores"], types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(tokens), BYTE in types
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = unk, bos if has_bos else -1, eos, -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = tokens[unk], tokens[bos], tokens[eos]
    normalizer.name, normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = "identity", False, True
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    content = model.SerializeToString()
    SentencePieceProcessor(model_proto=content)  # raises a RuntimeError if it is not valid
    return content


def model_proto(path: Path) -> Any:
    """SentencePiece's class of what is in its files."""
    try:
        return import_module("sentencepiece.sentencepiece_model_pb2").ModelProto
    except ImportError:
        raise UserError(f"to convert the tokenizer of {path}, install protobuf: pip install protobuf") from None


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
    model = model_proto(path).FromString(content)
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
