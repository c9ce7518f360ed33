"""Where Hugging Face's PEFT keeps what a LoRA file has, for both directions.

PEFT knows query, key and value as three layers, and orders the rows of queries and keys as Hugging Face's models do.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lit_llama.formats.huggingface import NAMES
from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMAConfig

MODULES = {  # what a target is called there
    "query": ("self_attn.q_proj",),
    "key": ("self_attn.k_proj",),
    "value": ("self_attn.v_proj",),
    "projection": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "head": ("lm_head",),
}


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
