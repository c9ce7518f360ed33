"""Files of finetuned weights: written so that they describe themselves, and read onto their base model.

A file holds {"kind": "lora" or "adapter", the method's config under that name, "base": the base model's config,
"prompt_style", "hyperparameters", "state_dict"}. The archived Lit-LLaMA wrote the tensors of "state_dict" alone.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter
from lit_llama.checkpoint import check_state, hint
from lit_llama.errors import UserError
from lit_llama.files import check_finite, read_file, write_file
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prompt import PromptStyle

FILE_NAMES = {"lora": "lit-llama-lora-finetuned.pth", "adapter": "lit-llama-adapter-finetuned.pth"}
ARCHIVED_STYLE: PromptStyle = "alpaca-stanford"


def describe(
    method: LoRAConfig | AdapterConfig | None,
    base: LLaMAConfig,
    prompt_style: PromptStyle,
    hyperparameters: Mapping[str, Any],
) -> dict[str, Any]:
    """What a file says about its weights; `method` is None if all weights are finetuned."""
    kind = {LoRAConfig: "lora", AdapterConfig: "adapter"}[type(method)] if method else "full"
    about = {"kind": kind, kind: asdict(method) if method else {}, "base": asdict(base)}
    return {**about, "prompt_style": prompt_style, "hyperparameters": dict(hyperparameters)}


def save_finetuned(path: Path, about: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write finite weights with what `describe` says of them."""
    check_finite(path, state)
    write_file(path, {**about, "state_dict": dict(state)})


def read_finetuned(
    path: Path, kind: Literal["lora", "adapter"], base: LLaMAConfig, alpha: float | None = None
) -> dict[str, Any]:
    """The content of a file, checked to be of this kind and for a base model of this config.

    Args:
        alpha: for a LoRA file of the archived Lit-LLaMA, which does not hold it.
    """
    content = read_file(path)
    if "kind" not in content and any(f"{kind}_" in name for name in content):
        method = archived_lora(path, content, alpha) if kind == "lora" else archived_adapter(content)
        content = {**describe(method, base, ARCHIVED_STYLE, {}), "state_dict": content}
    if content.get("kind") != kind:
        raise UserError(f"{path} is not a file that finetune_{kind}.py wrote{hint(content)}")
    if kind == "lora" and alpha not in (None, content["lora"]["alpha"]):
        raise UserError(f"{path} holds its own alpha, {content['lora']['alpha']}; leave out --lora_alpha")
    ours, theirs = asdict(base), asdict(LLaMAConfig(**content["base"]))
    different = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise UserError(f"{path} was made for a different base model: one with {'; '.join(different)}")
    return content


def archived_lora(path: Path, state: Mapping[str, Tensor], alpha: float | None) -> LoRAConfig:
    if alpha is None:
        raise UserError(
            f"{path} was written by the archived Lit-LLaMA, which did not store alpha; pass --lora_alpha (its default "
            "was 16)"
        )
    r = next(tensor.size(1) for name, tensor in state.items() if name.endswith("lora_B"))
    return LoRAConfig(r, alpha, dropout=0.0, targets=("query", "value"))


def archived_adapter(state: Mapping[str, Tensor]) -> AdapterConfig:
    prefixes = {int(name.split(".")[2]): tensor for name, tensor in state.items() if "adapter_wte" in name}
    return AdapterConfig(prompt_length=len(prefixes[min(prefixes)]), start_layer=min(prefixes))


def load_lora(model: LLaMA, path: Path, alpha: float | None = None) -> PromptStyle:
    """Add the LoRA layers of a file to its base model; returns the prompt style that they were trained with."""
    content = read_finetuned(path, "lora", model.config, alpha)
    add_lora(model, LoRAConfig(**content["lora"]))
    copy_state(path, content["state_dict"], lora_state_dict(model))
    return content["prompt_style"]


def load_adapter(model: LLaMA, path: Path) -> PromptStyle:
    """Add the adapter of a file to its base model; returns the prompt style that it was trained with."""
    content = read_finetuned(path, "adapter", model.config)
    add_adapter(model, AdapterConfig(**content["adapter"]))
    state = content["state_dict"]
    for name, tensor in state.items():
        if name.endswith("gating_factor") and tensor.numel() == 1:  # the first files had one gate for all heads
            state[name] = tensor.reshape(1, 1, 1, 1).expand(1, model.config.n_head, 1, 1)
    copy_state(path, state, adapter_state_dict(model))
    return content["prompt_style"]


def copy_state(path: Path, state: Mapping[str, Any], target: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `target` with those of `state`, read from `path`; they must agree in names and shapes."""
    check_state(path, state, target)
    for name, tensor in target.items():
        tensor.copy_(state[name])
