"""LoRA files of Hugging Face's PEFT, in both directions.

PEFT knows query, key and value as three layers, and orders the rows of queries and keys as Hugging Face's models do.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lit_llama.errors import UserError, short
from lit_llama.formats.huggingface import NAMES, Expected, check_known, halves_from_pairs, pairs_from_halves
from lit_llama.lora import LoRAConfig, lora_shapes
from lit_llama.model import LLaMAConfig
from lit_llama.storage.checks import from_fields

import torch
from torch import Tensor

PREFIX = "base_model.model."
MODULES = {  # what a target is called there
    "query": ("self_attn.q_proj",),
    "key": ("self_attn.k_proj",),
    "value": ("self_attn.v_proj",),
    "projection": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "head": ("lm_head",),
}

WRAPPERS = ("base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module")  # of names
SAVED_ALONG = {"embed_tokens.weight": "transformer.wte.weight", "lm_head.weight": "lm_head.weight"}
NOT_PLAIN = "only plain LoRA can be imported"
EXPECTED: Expected = {
    "peft_type": (("LORA",), NOT_PLAIN),
    "bias": ((None, "none"), "biases were trained, which LLaMA does not have"),
    "init_lora_weights": ((None, True, False, "gaussian", "orthogonal", "eva"), "it changes the base model, too"),
    "fan_in_fan_out": ((None, False), "LLaMA's layers do not store their weights transposed"),
    **{name: ((None, False, [], {}), NOT_PLAIN) for name in ("use_dora", "rank_pattern", "alpha_pattern")},
    **{name: ((None, False, [], {}), "other weights were trained, too") for name in ("modules_to_save", "lora_bias")},
    "alora_invocation_tokens": ((None,), "the update is only for the tokens after these"),
    "layer_replication": ((None,), "the model has copies of layers"),
}
HARMLESS = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
exclude_modules lora_dropout layers_to_transform layers_pattern megatron_core eva_config qalora_group_size use_qalora
runtime_config target_parameters ensure_weight_tying merge_weights"""  # what they do is in the tensors


class Part(NamedTuple):
    """Where the A and B of one of PEFT's modules lie in ours."""

    module: str  # model.layers.0.self_attn.q_proj
    layer: str  # transformer.h.0.attn.c_attn
    rows_A: slice
    rows_B: slice
    n_head: int | None = None  # heads whose rows the two order differently


def parts(base: LLaMAConfig, lora: LoRAConfig) -> Iterator[Part]:
    """All modules that have an update."""
    ours = {theirs.removesuffix(".weight"): name.removesuffix(".weight") for name, theirs in NAMES.items()}
    heads = {"query": base.n_head, "key": base.n_kv_head, "value": None}
    for i in range(base.n_layer):
        a = b = 0
        for (target, n_head), rows in zip(heads.items(), base.qkv_sizes, strict=True):
            if target in lora.targets:
                place = slice(a, a + lora.r), slice(b, b + rows)
                yield Part(f"model.layers.{i}.{MODULES[target][0]}", f"transformer.h.{i}.attn.c_attn", *place, n_head)
                a, b = a + lora.r, b + rows
        for target in ("projection", "mlp"):
            for module in MODULES[target] if target in lora.targets else ():
                yield Part(f"model.layers.{i}.{module}", f"transformer.h.{i}.{ours[module]}", slice(None), slice(None))
    if "head" in lora.targets:
        yield Part("lm_head", "lm_head", slice(None), slice(None))


def to_peft(state: Mapping[str, Tensor], base: LLaMAConfig, lora: LoRAConfig) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors for the LoRA parameters of a model."""
    result = {}
    for module, layer, rows_A, rows_B, n_head in parts(base, lora):
        A, B = state[f"{layer}.lora_A"][rows_A], state[f"{layer}.lora_B"][rows_B]
        result[f"{PREFIX}{module}.lora_A.weight"] = A.contiguous()
        result[f"{PREFIX}{module}.lora_B.weight"] = (halves_from_pairs(B, n_head) if n_head else B).contiguous()
    return result


def from_peft(
    tensors: Mapping[str, Tensor], base: LLaMAConfig, lora: LoRAConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse. A module that has no update there (one layer of many, say) gets one of zero.

    Args:
        weights: of the base model. Those of its embedding or head that PEFT has saved along must be the same.
    """
    state = {name: torch.zeros(tensor.shape) for name, tensor in lora_shapes(base, lora).items()}
    left = {plain_name(name): tensor for name, tensor in tensors.items()}
    if len(left) < len(tensors):
        raise UserError("it has several tensors for the same module, of several adapters perhaps; save one alone")
    for module, layer, rows_A, rows_B, n_head in parts(base, lora):
        A, B = (left.pop(f"{module}.lora_{x}.weight", None) for x in "AB")
        if A is None and B is None:
            continue
        if A is None or B is None:
            raise UserError(f"{module} has only one of A and B: a part is missing; save or copy it again")
        ours_A, ours_B = state[f"{layer}.lora_A"][rows_A], state[f"{layer}.lora_B"][rows_B]
        if A.shape != ours_A.shape or B.shape != ours_B.shape:
            raise UserError(f"{module} has A and B of {tuple(A.shape)} and {tuple(B.shape)}: made for another model")
        ours_A.copy_(A)
        ours_B.copy_(pairs_from_halves(B, n_head) if n_head else B)
    for name, tensor in left.items():
        ours = weights.get(SAVED_ALONG.get(name.replace(".base_layer", ""), ""))
        if ours is None:
            raise UserError(f"there is a tensor {name}, expected LoRA of attention, mlp or head")
        if ours.shape != tensor.shape or not torch.equal(tensor.to(ours.dtype), ours):
            raise UserError(f"{name} is not the base model's: it was trained, too, or the base is another one")
    return state


def plain_name(name: str) -> str:
    """The name of a tensor without what the programs around a model add to it, and without that of the adapter."""
    name = re.sub(r"(lora_[AB])\.\w+\.weight$", r"\1.weight", name)
    kept = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(["model", *kept] if kept[:1] == ["layers"] else kept)


def peft_config(lora: LoRAConfig, base_name: str) -> dict[str, Any]:
    """The fields of adapter_config.json; `base_name` is the Hugging Face model that it belongs to."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [name.rsplit(".")[-1] for target in lora.targets for name in MODULES[target]],
        "bias": "none",
        "fan_in_fan_out": False,
    }


def config_from_peft(fields: dict[str, Any], names: Collection[str]) -> LoRAConfig:
    """The inverse, for a file that has tensors of these names."""
    check_known(fields, {"r", "lora_alpha", "use_rslora", *HARMLESS.split()}, EXPECTED)
    first = next(iter(names), None)
    if first is None:
        raise UserError("its file has no tensors: the training that wrote it did not save them")
    present = {plain_name(name).rsplit(".", 2)[0].split(".", 3)[-1] for name in names}
    targets = tuple(target for target, modules in MODULES.items() if present & set(modules))
    if not targets:
        raise UserError(f"there is a tensor {short(first)}, expected PEFT's names of LoRA on attention, mlp or head")
    dropout = fields.get("lora_dropout", 0.0)
    given = {"r": fields["r"], "alpha": fields["lora_alpha"], "dropout": dropout, "targets": targets}
    config = from_fields(LoRAConfig, given)
    if fields.get("use_rslora"):  # it scales by alpha / sqrt(r) (arXiv 2312.03732)
        config = replace(config, alpha=config.alpha * math.sqrt(config.r))
    return config
