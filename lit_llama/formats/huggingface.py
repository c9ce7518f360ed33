"""Hugging Face's names, row order and configuration of the same models, in both directions."""

from collections.abc import Iterable
from typing import Any

from lit_llama.errors import UserError, short
from lit_llama.model import LLaMAConfig
from lit_llama.storage.checks import from_fields
from lit_llama.storage.files import is_plain

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


def from_hf(tensors: Iterable[tuple[str, Tensor]], config: LLaMAConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of LLaMA from the named tensors of a LlamaForCausalLM, which may come in any order."""
    names = {theirs: ours for ours, theirs in NAMES.items()}
    state: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if not is_plain(tensor) or not tensor.is_floating_point():
            raise UserError(f"{short(name)} is {short(tensor)}, expected floating-point numbers")
        layer, prefix, number = name, "", ""
        if name.startswith("model.layers.") and name.count(".") > 2:
            number, layer = name.removeprefix("model.layers.").split(".", 1)
            prefix = f"transformer.h.{number}."
        if layer in names:
            state[prefix + names[layer]] = tensor.to(dtype, copy=True)  # a mapped file could not be let go
        elif layer in QKV:
            parts = qkv.setdefault(f"{prefix}attn.c_attn.weight", {})
            parts[QKV[layer]] = tensor.to(dtype, copy=True)
            if len(parts) == 3:
                del qkv[f"{prefix}attn.c_attn.weight"]
                if any(parts[x].shape != (n, config.n_embd) for x, n in zip("qkv", config.qkv_sizes, strict=True)):
                    raise UserError(f"q, k or v of layer {number} has a shape that config.json does not imply")
                q, k = pairs_from_halves(parts["q"], config.n_head), pairs_from_halves(parts["k"], config.n_kv_head)
                state[f"{prefix}attn.c_attn.weight"] = torch.cat((q, k, parts["v"]))
        elif not layer.endswith("rotary_emb.inv_freq"):  # old files carry these tables
            raise UserError(f"there is a tensor {name}, which a LLaMA does not have")
    if config.tie_embeddings and "transformer.wte.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def hf_config(config: LLaMAConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of transformers' LlamaConfig."""
    scaling = config.rope_scaling and {
        "rope_type": "llama3",
        "factor": config.rope_scaling.factor,
        "low_freq_factor": config.rope_scaling.low_freq_factor,
        "high_freq_factor": config.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": config.rope_scaling.original_block_size,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # its name in transformers 4
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,  # transformers 4 reads these two, transformers 5 the third, vLLM what it finds
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tie_embeddings,
    }


def config_from_hf(fields: dict[str, Any]) -> LLaMAConfig:
    """The configuration from the fields of a config.json, as transformers 4 or 5 writes them."""
    if fields.get("model_type") != "llama":
        raise UserError(f"the model is of type {fields.get('model_type')!r}, expected 'llama'; get another model")
    head_size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    if head_size * fields["num_attention_heads"] != fields["hidden_size"]:
        raise UserError(f"heads of {head_size} channels do not add up to the width of {fields['hidden_size']}")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rotary scaling of type {kind!r} is not supported")
    scaling = None
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        ours = ("factor", "low_freq_factor", "high_freq_factor", "original_block_size")
        scaling = {name: rope[theirs] for name, theirs in zip(ours, names, strict=True)}
    values = {
        "block_size": fields["max_position_embeddings"],
        "vocab_size": fields["vocab_size"],
        "n_layer": fields["num_hidden_layers"],
        "n_head": fields["num_attention_heads"],
        "n_embd": fields["hidden_size"],
        "n_kv_head": fields.get("num_key_value_heads") or fields["num_attention_heads"],
        "n_hidden": fields["intermediate_size"],
        "norm_eps": fields["rms_norm_eps"],
        "rope_base": rope.get("rope_theta", fields.get("rope_theta", 10000.0)),
        "rope_scaling": scaling,
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    return from_fields(LLaMAConfig, values)
