"""GGUF files as llama.cpp writes them, and the metadata of their tokenizers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import convert_gguf_checkpoint
import numpy as np
import torch
from builders import TINY, random_model
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

GGUF_CONFIG = replace(TINY, vocab_size=300, n_embd=64, n_hidden=96, norm_eps=1e-5, rope_base=5e5, tie_embeddings=True)
QUANTISED = GGMLQuantizationType.Q8_0


def sentencepiece_metadata(sp: SentencePieceProcessor) -> dict[str, Any]:
    """What llama.cpp writes of a SentencePiece model into a GGUF."""
    pieces = ModelProto.FromString(sp.serialized_model_proto()).pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
    }


def bpe_metadata(tokenizer: HFTokenizer, pre: str = "smollm") -> dict[str, Any]:
    """What llama.cpp writes of the tests' byte-level BPE into a GGUF."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    architecture: str = "llama",
    without: str = "",
    extra: dict[str, np.ndarray] | None = None,
    split_max_tensors: int = 0,
) -> dict[str, Tensor]:
    """A GGUF as llama.cpp writes it, with quantised matrices; returns its weights under llama.cpp's names.

    `metadata` is the tokenizer's and whatever else there shall be; vectors of `extra` are stored as they are. With
    `split_max_tensors` there are several files, -00001-of-0000N and so on.
    """
    c, writer = GGUF_CONFIG, GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    shape = {
        "llama.context_length": c.block_size,
        "llama.embedding_length": c.n_embd,
        "llama.block_count": c.n_layer,
        "llama.feed_forward_length": c.n_hidden,
        "llama.attention.head_count": c.n_head,
        "llama.attention.head_count_kv": c.n_kv_head,
        "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
        "llama.rope.freq_base": c.rope_base,
    }
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (shape | metadata).items():
        add.get(type(value), writer.add_array)(key, value)
    tensors = gguf_tensors()
    tensors.pop(without, None)
    for name, tensor in tensors.items():
        array = tensor.numpy().astype(np.float32)
        if array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            array = quantize(array, QUANTISED)
            tensors[name] = torch.from_numpy(dequantize(array, QUANTISED))
            writer.add_tensor(f"{name}.weight", array, raw_dtype=QUANTISED)
    for name, array in (extra or {}).items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def gguf_tensors() -> dict[str, Tensor]:
    """Random weights under llama.cpp's names."""
    c, state = GGUF_CONFIG, random_model(GGUF_CONFIG).state_dict()
    tensors = {"token_embd": state["transformer.wte.weight"], "output_norm": state["transformer.ln_f.scale"]}
    names = {theirs: ours for theirs, ours in convert_gguf_checkpoint.TENSOR_NAMES.items() if "transformer" not in ours}
    for i in range(c.n_layer):
        for theirs, ours in names.items():
            if theirs != "output":
                tensors[f"blk.{i}.{theirs}"] = state[f"transformer.h.{i}.{ours}"]
        qkv = state[f"transformer.h.{i}.attn.c_attn.weight"].split(c.qkv_sizes)
        tensors |= {f"blk.{i}.attn_{x}": part for x, part in zip("qkv", qkv, strict=True)}
    return tensors
