"""Hugging Face's names, row order and configuration of the same models, for both directions."""

from collections.abc import Mapping
from typing import Any

from lit_llama.errors import UserError, check_type, short
from lit_llama.model import LLaMAConfig
from lit_llama.storage.checks import from_fields

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
OTHERS = "max_sequence_length num_key_value_heads head_dim rope_theta rope_scaling rope_parameters dtype torch_dtype"
Expected = Mapping[str, tuple[tuple[Any, ...], str]]  # the values that fields must have, and what others mean
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
