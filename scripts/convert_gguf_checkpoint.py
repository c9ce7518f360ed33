"""Convert a GGUF file of the llama architecture (quantised ones are dequantised) into a model folder.

llama.cpp orders the rows of queries and keys as Meta does, which is our order, too.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.errors import UserError, error_context, short
from lit_llama.formats.huggingface import Expected, check_known
from lit_llama.model import LLAMA_3_SCALING, LLaMAConfig, RopeScaling, stretch_frequencies
from lit_llama.model_folder import check_complete, save_model_folder
from lit_llama.progress import progress
from lit_llama.storage.checks import from_fields
from lit_llama.tokenizer import CONTROL, ENDS_NAME, USER_DEFINED

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from tokenizer_files import LLAMA_3, PRE_TOKENIZERS, byte_level_bpe, report_missing, tried
from tokenizers import AddedToken
from torch import Tensor

try:
    from gguf import GGUFReader, ReaderTensor, dequantize
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyrefly: ignore
except ImportError:
    sys.exit("error: GGUF files need more libraries; run: pip install -e '.[gguf]'")

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
MOST_PARTS = 2**10
MOST_VALUES = 2**22  # a vocabulary of a quarter of a million tokens takes 1.7 million
KNOWN = """context_length vocab_size block_count embedding_length feed_forward_length tensor_data_layout
    attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length
    attention.value_length attention.causal rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.type
    rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned"""
EXPECTED: Expected = {
    "general.type": ((None, "model"), "it holds no model; a LoRA is imported from PEFT's format, by import_peft.py"),
    "general.architecture": (("llama",), "it is of another architecture than 'llama'"),
    "llama.attention.causal": ((None, True), "it is not a language model"),
    "llama.expert_count": ((None, 0), "a mixture of experts is not supported"),
    "llama.rope.scaling.type": ((None, "none", "linear"), "rotary frequencies are stretched in another way than here"),
}
ROWS = 1024  # dequantised at a time; a whole tensor at once takes several times its size


class Reader(GGUFReader):
    """Reads what describes the tensors, unless that is cut off, or has more values than it should make objects of."""

    n_values = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        self.n_values += 1
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < count or self.n_values > MOST_VALUES:
            raise ValueError("it is cut off" if len(values) < count else "it has too many values")
        return values


class Metadata(dict[str, Any]):
    """What the GGUF at `path` says of its model; to ask for what it does not say is a UserError, not a KeyError."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        super().__init__({name: field.contents() for name, field in reader.fields.items()})
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path} does not say its {key}; get a GGUF from another source")


def main(gguf_path: Path, out_dir: Path) -> None:
    """Convert one GGUF file.

    Args:
        gguf_path: A .gguf file with `general.architecture = llama`.
        out_dir: The model folder to write: lit-llama.pth, config.json (with the chat template) and the tokenizer.
    """
    metadata, tensors = read_gguf(gguf_path)
    config = read_config(metadata, tensors)
    try:
        tokenizer = tokenizer_from_gguf(gguf_path, metadata)
    except UserError:
        raise
    except Exception as error:  # fields of the wrong type or length, or a library's own
        reason = " ".join(str(error).split())
        raise UserError(f"{gguf_path} does not describe a tokenizer ({reason}); get another GGUF") from None
    state = read_weights(gguf_path, tensors, config)
    check_complete(gguf_path, state, config)
    save_model_folder(out_dir, state, config, tokenizer, tried(metadata.get(CHAT_TEMPLATE)))
    report_missing(out_dir, config.vocab_size)
    print(f"Saved {out_dir}", file=sys.stderr)


def read_gguf(path: Path) -> tuple[Metadata, dict[str, ReaderTensor]]:
    """What the file holds, or, if it is one of the parts that llama-gguf-split makes, all of them together."""
    metadata, tensors = read_part(path)
    n, stem = metadata.get("split.count", 1), re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", path.name)
    if not isinstance(n, int) or n > MOST_PARTS:
        raise UserError(f"{path} has a split.count of {short(n)}, expected up to {MOST_PARTS}; download it again")
    parts = [path.with_name(f"{stem}-{i + 1:05}-of-{n:05}.gguf") for i in range(n)] if n > 1 else []
    if missing := [part for part in parts if not part.is_file()]:
        raise UserError(f"{path} is one of {n} parts, and {missing[0]} is missing; download it")
    if parts:
        read = [read_part(part) for part in parts]
        metadata, tensors = read[0][0], {name: tensor for _, part in read for name, tensor in part.items()}
        if len(tensors) < sum(len(part) for _, part in read):
            raise UserError(f"{path} is one of {n} parts that have the same tensors; download them again")
    return metadata, tensors


def read_part(path: Path) -> tuple[Metadata, dict[str, ReaderTensor]]:
    """Metadata, and tensors as they are stored and by llama.cpp's names; they stay on the disk until they are used."""
    try:
        reader = Reader(path)
        return Metadata(path, reader), {tensor.name: tensor for tensor in reader.tensors}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # of many kinds, NumPy's among them
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole GGUF file ({reason}); download it again, or update gguf") from None


def check_supported(metadata: Metadata, tensors: dict[str, ReaderTensor]) -> None:
    """Raise a UserError for what LLaMA does not have."""
    with error_context(metadata.path, "get another model"):
        known = {f"llama.{name}" for name in KNOWN.split()}
        said = {name: value for name, value in metadata.items() if name.startswith("llama.") or name in EXPECTED}
        check_known(said, known, EXPECTED)
        if "token_embd.weight" not in tensors:
            raise UserError("it has no weights, only a vocabulary")


def read_config(metadata: Metadata, tensors: dict[str, ReaderTensor]) -> LLaMAConfig:
    check_supported(metadata, tensors)
    metadata.setdefault("llama.attention.head_count_kv", 0)  # as many as query heads
    metadata.setdefault("llama.rope.freq_base", 10000.0)
    try:
        values = {ours: metadata[theirs] for ours, theirs in FIELDS.items()}
        values["norm_eps"] = shortest(values["norm_eps"])
        values["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])  # may be padded beyond the tokenizer's
        values["tie_embeddings"] = "output.weight" not in tensors
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{metadata.path} does not describe a LLaMA ({error}); get another model") from None
    with error_context(metadata.path, "get another model"):
        config = from_fields(LLaMAConfig, values)
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if (size := metadata.get(f"llama.{name}", config.head_size)) != config.head_size:
            expected = f"expected {config.head_size}, the channels of a head"
            raise UserError(f"{metadata.path} has a {name} of {size}, {expected}; get another model")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0))  # older files
    if factor != 1 and metadata.get("llama.rope.scaling.type", "linear") == "linear":
        config = replace(config, rope_scaling=RopeScaling(shortest(factor)))
    if ROPE_FREQS in tensors:
        config = replace(config, rope_scaling=read_rope_scaling(metadata.path, tensors[ROPE_FREQS], config))
    return config


def shortest(value: float) -> float:
    """The number that was written as float32: 1e-5, not 9.99999974e-06."""
    return float(f"{value:.6g}")


def read_rope_scaling(path: Path, tensor: ReaderTensor, config: LLaMAConfig) -> RopeScaling:
    """The settings behind the divisor of each rotary frequency, which is all that llama.cpp keeps of them."""
    divisors = dequantise(path, tensor)  # (hs / 2,)
    scaling = replace(LLAMA_3_SCALING, factor=shortest(divisors.max().item()))  # models differ in the factor alone
    expected = rope_divisors(replace(config, rope_scaling=scaling))
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise UserError(f"{path} scales its rotary frequencies in a way that is not known; it is not Llama 3.1's")
    return scaling


def rope_divisors(config: LLaMAConfig) -> Tensor:
    """By what the scaling of Llama 3.1 divides each rotary frequency, which is all that llama.cpp keeps of it."""
    freqs = config.rope_base ** -(torch.arange(0, config.head_size, 2) / config.head_size)  # (hs / 2,)
    return freqs / stretch_frequencies(freqs, config.rope_scaling) if config.rope_scaling else torch.ones_like(freqs)


def read_weights(path: Path, tensors: dict[str, ReaderTensor], config: LLaMAConfig) -> dict[str, Tensor]:
    """The state dict of LLaMA, dequantised to float32."""
    state: dict[str, Tensor] = {}
    qkv: dict[str, list[Tensor]] = {}
    for tensor in progress(tensors.values(), "Dequantising", "tensor"):
        if tensor.name == ROPE_FREQS:  # is in the config
            continue
        weight = dequantise(path, tensor)
        *block, name = tensor.name.removesuffix(".weight").split(".")  # blk, 0, attn_q
        prefix = f"transformer.h.{block[1]}." if block else ""
        if name in ("attn_q", "attn_k", "attn_v"):
            parts = qkv.setdefault(prefix, [torch.empty(0)] * 3)
            parts["qkv".index(name[-1])] = weight
            if all(len(part) for part in parts):
                state[f"{prefix}attn.c_attn.weight"] = torch.cat(qkv.pop(prefix))  # ((nh + 2 nkv) hs, C)
        elif name in TENSOR_NAMES:
            state[prefix + TENSOR_NAMES[name]] = weight
        else:
            raise UserError(f"{path} has a tensor {tensor.name}, which LLaMA does not have")
    if config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def dequantise(path: Path, tensor: ReaderTensor) -> Tensor:
    """A tensor in float32."""
    weight = torch.empty(tensor.shape.tolist()[::-1])
    try:
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            weight.numpy()[rows] = dequantize(tensor.data[rows], tensor.tensor_type)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged: {tensor.name} cannot be read ({error}); download it again") from None
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise UserError(f"{path} holds {tensor.name} as {kind}, which the installed gguf cannot dequantise") from None
    return weight


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes | str]:
    """The tokenizer that the metadata of the GGUF at `path` describes, as files by their names."""
    ends = [metadata[name] for name in ENDS if name in metadata]
    files = {ENDS_NAME: json.dumps({"eos_token_id": ends})} if len({*ends}) > 1 else {}
    model, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    if model == "llama":
        return {"tokenizer.model": sentencepiece_from_gguf(metadata), **files}
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


def sentencepiece_from_gguf(metadata: Mapping[str, Any]) -> bytes:
    """A `tokenizer.model` with the same pieces, scores and settings as the one that the GGUF was made from."""
    model = ModelProto()
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


if __name__ == "__main__":
    run(main)
