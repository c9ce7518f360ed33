"""Import a LoRA that Hugging Face's PEFT has trained, for generate_lora.py and all others that take a LoRA file."""

import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.errors import UserError, short
from lit_llama.finetuned import describe, save_finetuned, skeleton
from lit_llama.formats.huggingface import Expected, check_known, pairs_from_halves
from lit_llama.formats.peft import MODULES, parts
from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMAConfig
from lit_llama.model_folder import find_model, identity, own_template, read_config, suggest_script
from lit_llama.prompt import find_template, name_of
from lit_llama.storage.checks import from_fields
from lit_llama.storage.files import check_apart, read_file, read_json, read_safetensors

import torch
from tokenizer_files import read_chat_template
from torch import Tensor

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


def main(
    peft_dir: Path,
    out_path: Path,
    pretrained_path: Path | None = None,
    prompt_style: str | None = None,
) -> None:
    """Write a LoRA file.

    Args:
        peft_dir: The folder with adapter_config.json and adapter_model.safetensors or adapter_model.bin.
        out_path: The file to write.
        pretrained_path: The checkpoint of the base model, converted from the Hugging Face model that PEFT used.
            Default: checkpoints/lit-llama/7B, or else the model written last.
        prompt_style: The chat template that it was trained with, which PEFT does not store: own (that of the tokenizer
            in the folder, or else of the base model), alpaca, chatml or another style of lit_llama/prompt.py, or a
            file that holds one. By default own, or alpaca if neither has one.
    """
    pretrained_path = find_model(pretrained_path)
    for source in (pretrained_path, pretrained_path.with_name("config.json"), *peft_dir.glob("adapter_*")):
        check_apart(source, out_path)
    weights = read_file(pretrained_path, check_tensors=False)
    base = read_config(pretrained_path, weights)
    if not (peft_dir / "adapter_config.json").is_file():
        raise UserError(f"{peft_dir} has no adapter_config.json{suggest_script(peft_dir) or '; give a folder of PEFT'}")
    fields, tensors = read_json(peft_dir / "adapter_config.json"), read_tensors(peft_dir)
    try:
        config = config_from_peft(fields, tensors)
        state = from_peft(tensors, base, config, weights)
    except UserError as error:
        raise UserError(f"could not import {peft_dir}: {error}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{peft_dir}/adapter_config.json does not describe a LoRA ({error!r}); copy it again") from None
    template = find_template(prompt_style, read_chat_template(peft_dir) or own_template(pretrained_path), "alpaca")
    save_finetuned(out_path, describe(config, base, template, identity(pretrained_path)), state)
    print(f"Saved {out_path}, with the prompt style {name_of(template)}", file=sys.stderr)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        return read_file(folder / "adapter_model.bin")
    if not path.is_file():
        raise UserError(f"{path} does not exist, nor does adapter_model.bin; give the folder that PEFT has saved")
    return dict(read_safetensors(path))


def from_peft(
    tensors: Mapping[str, Tensor], base: LLaMAConfig, lora: LoRAConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The LoRA parameters of a model. A module that has no update there (one layer of many, say) gets one of zero.

    Args:
        weights: of the base model. Those of its embedding or head that PEFT has saved along must be the same.
    """
    state = {name: torch.zeros(tensor.shape) for name, tensor in skeleton(base, lora)[1].items()}
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


def config_from_peft(fields: dict[str, Any], names: Collection[str]) -> LoRAConfig:
    """The config of a LoRA from adapter_config.json, for a file that has tensors of these names."""
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


if __name__ == "__main__":
    run(main)
