"""Hugging Face's names, row order and configuration of the same models."""

from typing import Any

import torch
from torch import Tensor

from lit_llama.model import LLaMAConfig

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


def halves_from_pairs(weight: Tensor, n_head: int) -> Tensor:
    """Rows of q or k (n_head * hs, ...) from Meta's order to Hugging Face's.

    Meta rotates channels (0, 1), (2, 3), ... of a head together, Hugging Face (0, hs / 2), (1, hs / 2 + 1), ...
    """
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


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
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if scaling := config.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_block_size,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
    }
