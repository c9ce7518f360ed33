"""Files of finetuned weights: written so that they describe themselves, and read onto their base model.

A file holds {"kind": "lora" or "adapter", the method's config under that name, "base": the base model's config,
"prompt_style", "hyperparameters", "state_dict"}; "hyperparameters" name the base model's file and its
fingerprint. The archived Lit-LLaMA wrote the tensors of "state_dict" alone.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter
from lit_llama.checkpoint import check_state, hint
from lit_llama.checks import check_types, from_fields
from lit_llama.errors import UserError, error_context, short
from lit_llama.files import check_finite, is_plain, read_file, write_file
from lit_llama.integrity import check_base, identity
from lit_llama.lora import LoRAConfig, add_lora, lora_shapes, lora_state_dict
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prompt import TEMPLATES, PromptStyle

FILE_NAMES = {"lora": "lit-llama-lora-finetuned.pth", "adapter": "lit-llama-adapter-finetuned.pth"}
FIELDS = {"base": Mapping, "prompt_style": str, "hyperparameters": Mapping, "state_dict": Mapping}
Setting = int | float | str | bool | None
PROGRESS = {  # what a training state has in addition
    "version": int,
    "step": int,
    "best": Mapping,
    "optimizer": Mapping,
    "metrics": str,
    "precision": Mapping,
    "shards": Mapping,
}
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
    grown = [tensor for name, tensor in state.items() if name.endswith(("lora_B", "gating_factor"))]  # from zero
    if grown and not any(tensor.any() for tensor in grown):
        raise UserError(f"{path} was not written: all of its updates are zero, so nothing was learned")
    write_file(path, {**about, "state_dict": dict(state)})


def read_described(path: Path) -> dict[str, Any]:
    """What `save_finetuned` wrote, checked to be just that; or what version 1.0 or the archived Lit-LLaMA wrote."""
    content = read_file(path)
    if "kind" not in content:
        return content
    content.pop("checksum", None)  # older files have a second one; the archive's own is checked already
    with error_context(path, "it may be damaged: copy or write it again"):
        method = {content["kind"]: Mapping} if content["kind"] in ("lora", "adapter", "full") else {}
        check_types(content, {"kind": str, **method, **FIELDS}, PROGRESS)
        if content["prompt_style"] not in TEMPLATES:
            raise UserError(f"prompt_style is {short(content['prompt_style'])}, expected one of {', '.join(TEMPLATES)}")
        check_types(content["hyperparameters"], {}, dict.fromkeys(content["hyperparameters"], Setting))
        for name, tensor in content["state_dict"].items():
            if not is_plain(tensor):
                raise UserError(f"{short(name)} is {short(tensor)}, expected a tensor")
    return content


def read_finetuned(
    path: Path,
    kind: Literal["lora", "adapter"],
    base: LLaMAConfig,
    alpha: float | None = None,
    base_path: Path | None = None,
    force: bool = False,
) -> tuple[Any, dict[str, Tensor], PromptStyle]:
    """The method's config, the tensors and the prompt style of a file, checked to be of this kind and for this base.

    Args:
        alpha: for a LoRA file of the archived Lit-LLaMA, which does not hold it.
        base_path: the checkpoint of the base model, if it is to be compared with the one that was trained on.
        force: use it on another base model of the same shape, too.
    """
    content = read_described(path)
    if "kind" not in content and any(f"{kind}_" in name for name in content):
        method = archived_lora(path, content, alpha) if kind == "lora" else archived_adapter(path, content)
        return method, content, ARCHIVED_STYLE
    if content.get("kind") != kind:
        raise UserError(f"{path} is not a file that finetune_{kind}.py wrote{hint(content)}")
    if kind == "lora" and alpha not in (None, content["lora"].get("alpha")):
        raise UserError(f"{path} holds its own alpha, {content['lora']['alpha']}; leave out --lora_alpha")
    with error_context(path, "copy or write it again"):
        method = from_fields(LoRAConfig if kind == "lora" else AdapterConfig, content[kind])
        theirs, ours = asdict(from_fields(LLaMAConfig, content["base"])), asdict(base)
    different = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise UserError(f"{path} was made for a different base model: one with {'; '.join(different)}")
    if base_path and not force:
        remedy = "give its own base model, or --force true to use this one"
        check_base(path, content["hyperparameters"], identity(base_path), remedy)
    return method, content["state_dict"], content["prompt_style"]


def base_is_nf4(*paths: Path | None) -> bool:
    """Whether LoRA or adapter files learned on a base in 4 bits, so that it is to be rounded as it was then."""
    contents = [read_described(path) for path in paths if path]
    kinds = {content.get("hyperparameters", {}).get("quantize") for content in contents}
    if len(kinds) > 1:
        raise UserError(
            "some of the LoRA files were trained on a 4-bit base and some were not; give one kind at a time"
        )
    return kinds == {"nf4"}


def archived_lora(path: Path, state: Mapping[str, Tensor], alpha: float | None) -> LoRAConfig:
    if alpha is None:
        raise UserError(
            f"{path} was written by the archived Lit-LLaMA, which did not store alpha; pass --lora_alpha (its default "
            "was 16)"
        )
    ranks = [tensor.size(1) for name, tensor in state.items() if name.endswith("lora_B") and is_matrix(tensor)]
    fields = {"r": (ranks or [0])[0], "alpha": alpha, "dropout": 0.0, "targets": ("query", "value")}
    with error_context(path):
        return from_fields(LoRAConfig, fields)


def archived_adapter(path: Path, state: Mapping[str, Tensor]) -> AdapterConfig:
    matches = [(re.fullmatch(r"transformer\.h\.(\d{1,4})\.attn\.adapter_wte\.weight", name), name) for name in state]
    prefixes = {int(match[1]): len(state[name]) for match, name in matches if match and is_matrix(state[name])}
    first = min(prefixes, default=0)
    with error_context(path):
        return from_fields(AdapterConfig, {"prompt_length": prefixes.get(first, 0), "start_layer": first})


def is_matrix(value: Any) -> bool:
    return is_plain(value) and value.dim() == 2


def load_lora(
    model: LLaMA, path: Path, alpha: float | None = None, base_path: Path | None = None, force: bool = False
) -> PromptStyle:
    """Add the LoRA layers of a file to its base model; returns the prompt style that they were trained with."""
    config, state, prompt_style = read_finetuned(path, "lora", model.config, alpha, base_path, force)
    check_state(path, state, lora_shapes(model.config, config))
    add_lora(model, config)
    copy_state(state, lora_state_dict(model))
    return prompt_style


def load_adapter(model: LLaMA, path: Path, base_path: Path | None = None, force: bool = False) -> PromptStyle:
    """Add the adapter of a file to its base model; returns the prompt style that it was trained with."""
    config, state, prompt_style = read_finetuned(path, "adapter", model.config, None, base_path, force)
    for name, tensor in state.items():
        if name.endswith("gating_factor") and is_plain(tensor) and tensor.numel() == 1:  # as the first files had it
            state[name] = tensor.reshape(1, 1, 1, 1).expand(1, model.config.n_head, 1, 1).contiguous()
    with torch.device("meta"):
        like = LLaMA(model.config)
        add_adapter(like, config)
    check_state(path, state, adapter_state_dict(like))
    add_adapter(model, config)
    copy_state(state, adapter_state_dict(model))
    return prompt_style


def copy_state(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `target` with those of `state`."""
    for name, tensor in target.items():
        tensor.copy_(state[name])
