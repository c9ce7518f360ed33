"""GGUF, the format of llama.cpp: its names for our weights, and what it says of a model or of a LoRA.

llama.cpp orders the rows of queries and keys as Meta does, which is our order, too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lit_llama.errors import UserError
from lit_llama.formats.huggingface import NAMES
from lit_llama.formats.peft import parts
from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMAConfig, stretch_frequencies

import torch
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


def lora_metadata(lora: LoRAConfig) -> dict[str, Any]:
    return {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(lora.alpha)}
