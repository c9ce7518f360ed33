"""Convert a GGUF file of the llama architecture (quantised ones are dequantised) into a model folder."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.chat_templates import style_of
from lit_llama.checkpoint import check_complete, save_model_folder
from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.gguf_format import CHAT_TEMPLATE, ROPE_FREQS, TENSOR_NAMES, rope_divisors
from lit_llama.model import LLAMA_3_SCALING, LLaMAConfig, RopeScaling
from lit_llama.tokenizer_formats import from_gguf

try:
    from gguf import GGUFReader, ReaderTensor, dequantize
except ImportError:
    sys.exit("error: GGUF files need one more library; run: pip install -e '.[gguf]'")

ROWS = 1024  # dequantised at a time; a whole tensor at once takes several times its size


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
        out_dir: The model folder to write: lit-llama.pth, config.json (with the prompt style) and the tokenizer.
    """
    metadata, tensors = read_gguf(gguf_path)
    config = read_config(metadata, tensors)
    tokenizer = from_gguf(gguf_path, metadata)
    state = read_weights(gguf_path, tensors, config)
    check_complete(gguf_path, state, config)
    prompt_style = style_of(gguf_path, metadata.get(CHAT_TEMPLATE))
    save_model_folder(out_dir, state, config, tokenizer, prompt_style)
    print(f"Saved {out_dir}", file=sys.stderr)


def read_gguf(path: Path) -> tuple[Metadata, dict[str, ReaderTensor]]:
    """Metadata, and tensors as they are stored and by llama.cpp's names; they stay on the disk until they are used."""
    try:
        reader = GGUFReader(path)
        return Metadata(path, reader), {tensor.name: tensor for tensor in reader.tensors}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, LookupError, OSError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}); download it again, or update gguf") from None


def check_supported(metadata: Metadata, tensors: dict[str, ReaderTensor]) -> None:
    """Raise a UserError for what LLaMA does not have."""
    path, architecture = metadata.path, metadata["general.architecture"]
    if architecture != "llama":
        raise UserError(f"{path} holds a model of architecture {architecture!r}, expected 'llama'")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} has no weights, only a vocabulary; get the model itself")
    if experts := metadata.get("llama.expert_count", 0):
        raise UserError(f"{path} holds a mixture of {experts} experts, which is not supported; get a dense model")
    scaling = "linear" if metadata.get("llama.rope.scale_linear", 1.0) != 1 else "none"  # as older files name it
    scaling = metadata.get("llama.rope.scaling.type", scaling)
    if scaling != "none":
        raise UserError(f"{path} stretches its rotary frequencies in the {scaling} way; only Llama 3.1's is supported")


def read_config(metadata: Metadata, tensors: dict[str, ReaderTensor]) -> LLaMAConfig:
    check_supported(metadata, tensors)
    try:
        config = LLaMAConfig(
            block_size=metadata["llama.context_length"],
            vocab_size=int(tensors["token_embd.weight"].shape[-1]),  # may be padded beyond the tokenizer's
            n_layer=metadata["llama.block_count"],
            n_head=metadata["llama.attention.head_count"],
            n_embd=metadata["llama.embedding_length"],
            n_kv_head=metadata.get("llama.attention.head_count_kv", 0),
            n_hidden=metadata["llama.feed_forward_length"],
            norm_eps=shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
            rope_base=metadata.get("llama.rope.freq_base", 10000.0),
            tie_embeddings="output.weight" not in tensors,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{metadata.path} does not describe a LLaMA ({error}); get another model") from None
    rotated = metadata.get("llama.rope.dimension_count", config.head_size)
    if rotated != config.head_size:
        raise UserError(f"{metadata.path} rotates {rotated} channels of a head, LLaMA all {config.head_size} of them")
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


def read_weights(path: Path, tensors: dict[str, ReaderTensor], config: LLaMAConfig) -> dict[str, Tensor]:
    """The state dict of LLaMA, dequantised to float32."""
    state: dict[str, Tensor] = {}
    qkv: dict[str, list[Tensor]] = {}
    for tensor in tqdm(tensors.values(), desc="Dequantising", unit="tensor"):
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
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise UserError(f"{path} holds {tensor.name} as {kind}, which the installed gguf cannot dequantise") from None
    return weight


if __name__ == "__main__":
    run(main)
