"""Hugging Face's names, row order and configuration of the same models, for both directions."""

from collections.abc import Mapping
from typing import Any

from lit_llama.errors import UserError
from lit_llama.model import LLaMAConfig

import torch
from torch import Tensor

NAMES = {
    "rms_1.scale": "input_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "rms_2.scale": "post_attention_layernorm.weight",
    "mlp.c_fc1.weight": "mlp.gate_proj.weight",
    "mlp.c_fc2.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.scale": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
QKV = {f"self_attn.{letter}_proj.weight": letter for letter in "qkv"}  # one c_attn here

FIELDS = {  # of config.json, with our names and what transformers takes if they are not there
    "max_position_embeddings": ("block_size", 2048),
    "vocab_size": ("vocab_size", 32000),
    "num_hidden_layers": ("n_layer", 32),
    "num_attention_heads": ("n_head", 32),
    "hidden_size": ("n_embd", 4096),
    "intermediate_size": ("n_hidden", 11008),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_embeddings", False),
}
Expected = Mapping[str, tuple[tuple[Any, ...], str]]  # the values that fields must have, and what others mean
SCALING = {  # of the rotary frequencies: the fields of each kind, with our names
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_block_size",
    },
}


def halves_from_pairs(weight: Tensor, n_head: int) -> Tensor:
    """Rows of q or k (n_head * hs, ...) from Meta's order to Hugging Face's.

    Meta rotates channels (0, 1), (2, 3), ... of a head together, Hugging Face (0, hs / 2), (1, hs / 2 + 1), ...
    """
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs_from_halves(weight: Tensor, n_head: int) -> Tensor:
    """The inverse of `halves_from_pairs`."""
    return weight.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_hf(state: dict[str, Tensor], config: LLaMAConfig) -> dict[str, Tensor]:
    """The state dict of LLaMA as that of transformers' LlamaForCausalLM."""
    result = {}
    for name, tensor in state.items():
        parts = name.split(".", 3)  # transformer, h, 0, attn.c_attn.weight
        if parts[1] != "h":
            result[NAMES[name]] = tensor
            continue
        prefix = f"model.layers.{parts[2]}."
        if parts[3] == "attn.c_attn.weight":
            q, k, v = tensor.split(config.qkv_sizes)
            result[f"{prefix}self_attn.q_proj.weight"] = halves_from_pairs(q, config.n_head)
            result[f"{prefix}self_attn.k_proj.weight"] = halves_from_pairs(k, config.n_kv_head)
            result[f"{prefix}self_attn.v_proj.weight"] = v
        else:
            result[prefix + NAMES[parts[3]]] = tensor
    return result


def hf_config(config: LLaMAConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of transformers' LlamaConfig."""
    scaling = None
    if ours := config.rope_scaling:
        kind = "llama3" if ours.original_block_size else "linear"
        scaling = {"rope_type": kind, **{theirs: getattr(ours, name) for theirs, name in SCALING[kind].items()}}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # its name in transformers 4
        **{theirs: getattr(config, ours) for theirs, (ours, _) in FIELDS.items()},
        "num_key_value_heads": config.n_kv_head,
        "rope_theta": config.rope_base,  # transformers 4 reads these two, transformers 5 the third, vLLM what it finds
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_base},
    }


def check_known(fields: Mapping[str, Any], known: set[str], expected: Expected | None = None, whose: str = "") -> None:
    """Raise a UserError at a field that changes what is computed, or may do so: it is set, and neither is known."""
    for name, (values, meaning) in (expected or {}).items():
        if fields.get(name) not in values:
            raise UserError(f"{name} is {fields.get(name)!a:.60}: {meaning}")
    for name in sorted({*fields} - known - {*(expected or ())}):
        if fields[name] and not name.startswith("_"):
            raise UserError(
                f"{whose}{name} is {fields[name]!a:.60}, which is not known here and may change what is computed; "
                "remove it if it does not"
            )
