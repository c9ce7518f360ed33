"""Files of finetuned weights: written so that they describe themselves, and read onto their base model.

A file holds {"kind": "lora" or "adapter", the method's config under that name, "base": the base model's config,
"prompt_style", "hyperparameters", "state_dict"}. The prompt style is a chat template (in earlier files, the name of one
of ours); "hyperparameters" name the base model's file and its fingerprint. The archived Lit-LLaMA wrote the tensors of
"state_dict" alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter, cache_prefix
from lit_llama.device import default_device
from lit_llama.errors import UserError, error_context
from lit_llama.lora import LoRAConfig, LoRALinear, add_lora, lora_layers, lora_state_dict, merge_lora
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.model_folder import check_base, check_state, file_in, identity, load_model, suggest_flag
from lit_llama.progress import say
from lit_llama.prompt import STYLES, stored_template
from lit_llama.quantization import Quantization, quantize_int8
from lit_llama.storage.checks import check_types, from_fields
from lit_llama.storage.files import is_plain, read_file, write_tensors

import torch
from torch import Tensor, nn

Kind = Literal["lora", "adapter"]
FILE_NAMES: dict[Kind, str] = {"lora": "lit-llama-lora-finetuned.pth", "adapter": "lit-llama-adapter-finetuned.pth"}
FIELDS = {"base": Mapping, "prompt_style": str, "hyperparameters": Mapping, "state_dict": Mapping}
Setting = int | float | str | bool | None
PROGRESS = {"step": int, "best": Mapping, "optimizer": Mapping, "precision": Mapping}  # more of a training state
ARCHIVED = STYLES["alpaca-stanford"]


def describe(
    method: LoRAConfig | AdapterConfig | None, base: LLaMAConfig, prompt_style: str, hyperparameters: Mapping[str, Any]
) -> dict[str, Any]:
    """What a file says about its weights; `method` is None if all weights are finetuned."""
    kind = {LoRAConfig: "lora", AdapterConfig: "adapter"}[type(method)] if method else "full"
    metadata = {"kind": kind, kind: asdict(method) if method else {}, "base": asdict(base)}
    return {**metadata, "prompt_style": prompt_style, "hyperparameters": dict(hyperparameters)}


def save_finetuned(path: Path, metadata: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write finite weights with what `describe` says of them."""
    grown = [tensor for name, tensor in state.items() if name.endswith(("lora_B", "gating_factor"))]  # from zero
    if grown and not any(tensor.any() for tensor in grown):
        raise UserError(f"{path} was not written: all of its updates are zero, so nothing was learned")
    write_tensors(path, {**metadata, "state_dict": dict(state)})


def read_described(path: Path, check_tensors: bool = True) -> dict[str, Any]:
    """What `save_finetuned` wrote, checked to be just that; or what the archived Lit-LLaMA wrote."""
    content = read_file(path, check_tensors)
    if "kind" not in content:
        return content
    with error_context(path, "it may be damaged: copy or write it again"):
        method = {content["kind"]: Mapping} if content["kind"] in ("lora", "adapter", "full") else {}
        check_types(content, {"kind": str, **method, **FIELDS}, PROGRESS)
        content["prompt_style"] = stored_template(content["prompt_style"])
        check_types(content["hyperparameters"], {}, dict.fromkeys(content["hyperparameters"], Setting))
    return content


@dataclass(frozen=True)
class FinetunedFile:
    """What a file of LoRA or adapter weights holds."""

    path: Path
    config: Any  # a LoRAConfig or an AdapterConfig
    tensors: Mapping[str, Tensor]  # the trained parameters under Lit-LLaMA's names
    prompt_style: str = ARCHIVED
    base: LLaMAConfig | None = None  # which the archived Lit-LLaMA did not store, nor hyperparameters
    hyperparameters: Mapping[str, Setting] = field(default_factory=dict)

    def tensors_for(self, base: LLaMAConfig) -> dict[str, Tensor]:
        """The tensors; a UserError if they are not those that this method trains on a base model of this config."""
        theirs, ours = asdict(self.base or base), asdict(base)
        if different := [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]:
            raise UserError(f"{self.path} was made for a different base model: one with {'; '.join(different)}")
        tensors = dict(self.tensors)
        for name, tensor in tensors.items():
            if name.endswith("gating_factor") and is_plain(tensor) and tensor.numel() == 1:  # as the first files had it
                tensors[name] = tensor.reshape(1, 1, 1, 1).expand(1, base.n_head, 1, 1).contiguous()
        check_state(self.path, tensors, skeleton(base, self.config)[1])
        return tensors

    def add_to(self, model: LLaMA) -> None:
        """Add the layers of the method to its base model, with these weights."""
        tensors = self.tensors_for(model.config)
        for name, parameter in add_method(model, self.config).items():
            parameter.copy_(tensors[name])

    def lora_layers(self, base: LLaMAConfig) -> dict[str, LoRALinear]:
        """The layers of a LoRA file by name, without the weights of the base; good until the next call."""
        layers, tensors = dict(lora_layers(skeleton(base, self.config)[0])), self.tensors_for(base)
        for name, layer in layers.items():
            layer.lora_A, layer.lora_B = (nn.Parameter(tensors[f"{name}.lora_{letter}"]) for letter in "AB")
        return layers


@cache
def skeleton(base: LLaMAConfig, config: LoRAConfig | AdapterConfig) -> tuple[LLaMA, dict[str, Tensor]]:
    """A model with the layers that a config describes, and the parameters that are trained in them, without data."""
    with torch.device("meta"):
        return (model := LLaMA(base)), add_method(model, config)


def add_method(model: LLaMA, config: LoRAConfig | AdapterConfig) -> dict[str, Tensor]:
    """Add the layers that a config describes; returns the parameters that are trained in them."""
    if isinstance(config, LoRAConfig):
        add_lora(model, config)
        return lora_state_dict(model)
    add_adapter(model, config)
    return adapter_state_dict(model)


def read_finetuned(
    path: Path, kind: Kind, alpha: float | None = None, base_path: Path | None = None, force: bool = False
) -> FinetunedFile:
    """Read a file, or the best of a run's folder; check that it is of this kind and, unless `force`, for this base.

    `alpha` is for a LoRA file of the archived Lit-LLaMA, which does not hold it.
    """
    if (best := path / FILE_NAMES[kind].replace(".pth", "-best.pth")).is_file():
        say(f"{path}: using {best.name}, which had the lowest validation loss")
        path = best
    path = file_in(path, FILE_NAMES[kind])
    content = read_described(path)
    if "kind" not in content and any(f"{kind}_" in name for name in content):
        if kind == "lora" and alpha is None:
            remedy = "pass --lora_alpha (its default was 16)"
            raise UserError(f"{path} was written by the archived Lit-LLaMA, which did not store alpha; {remedy}")
        with error_context(path):
            return FinetunedFile(path, archived_config(kind, content, alpha), content)
    if content.get("kind") != kind:
        raise UserError(f"{path} is not a file that finetune_{kind}.py wrote{suggest_flag(content)}")
    if kind == "lora" and alpha not in (None, content["lora"].get("alpha")):
        raise UserError(f"{path} holds its own alpha, {content['lora']['alpha']}; leave out --lora_alpha")
    with error_context(path, "copy or write it again"):
        config = from_fields(LoRAConfig if kind == "lora" else AdapterConfig, content[kind])
        base = from_fields(LLaMAConfig, content["base"])
    hyperparameters = content["hyperparameters"]
    if base_path and not force:
        check_base(
            path, hyperparameters, identity(base_path), "give its own base model, or use this one by --force true"
        )
    return FinetunedFile(path, config, content["state_dict"], content["prompt_style"], base, hyperparameters)


def archived_config(kind: Kind, state: Mapping[str, Tensor], alpha: float | None) -> LoRAConfig | AdapterConfig:
    """The config of a file of the archived Lit-LLaMA, as its tensors imply it."""
    if any(name.endswith("adapter_bias") for name in state):
        raise UserError("it is an adapter v2 of the archived Lit-LLaMA, which cannot be read; run finetune_lora.py")
    matrices = {name: tensor for name, tensor in state.items() if is_plain(tensor) and tensor.dim() == 2}
    if kind == "lora":
        r = next((tensor.size(1) for name, tensor in matrices.items() if name.endswith("lora_B")), 0)
        return LoRAConfig(r, alpha, dropout=0.0, targets=("query", "value"))  # pyrefly: ignore
    pattern = re.compile(r"transformer\.h\.(\d{1,4})\.attn\.adapter_wte\.weight")
    lengths = {int(match[1]): len(matrices[name]) for name in matrices if (match := pattern.fullmatch(name))}
    first = min(lengths, default=0)
    return AdapterConfig(lengths.get(first, 0), first)


def base_is_nf4(*files: FinetunedFile | None) -> bool:
    """Whether LoRA or adapter weights were learned on a base in 4 bits, so that it is to be rounded as it was then."""
    answers = {file.hyperparameters.get("quantize") == "nf4" for file in files if file}
    if len(answers) > 1:
        raise UserError("some of the files were trained on a 4-bit base and some were not; give one kind at a time")
    return True in answers


def load_for_use(
    path: Path,
    dtype: torch.dtype,
    files: Iterable[FinetunedFile | None] = (),
    quantize: Quantization | None = None,
    merge: bool = True,
) -> LLaMA:
    """A base model on the default device with what was finetuned on it, LoRA merged into it or apart.

    In 8 bits there can be no LoRA apart. A base that is to be in 4 bits, or was when the files were trained, is in 4
    bits where no LoRA is merged into it.
    """
    device, files = default_device(), [file for file in files if file]
    nf4 = quantize == "nf4" or base_is_nf4(*files)
    model = load_model(path, nf4=nf4) if quantize == "int8" else load_model(path, dtype, device, nf4)
    for file in files:
        file.add_to(model)
    if merge or quantize == "int8":
        merge_lora(model)
    if quantize == "int8":
        quantize_int8(model, dtype, device)
    else:
        model.to(dtype)
    cache_prefix(model)
    return model.eval()
