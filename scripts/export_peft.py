"""Export a LoRA file to the format of Hugging Face's PEFT, to be loaded onto the original Hugging Face model."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.finetuned import base_is_nf4, read_finetuned
from lit_llama.formats.huggingface import halves_from_pairs
from lit_llama.formats.peft import MODULES, parts
from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMAConfig
from lit_llama.model_folder import find_model, read_config
from lit_llama.storage.files import read_file, replacing_folder, write_file
from lit_llama.tokenizer import find_tokenizer

from export_hf import hf_tokenizer, write_safetensors
from tokenizer_files import TOKENIZER_FILES
from torch import Tensor

PREFIX = "base_model.model."
PEFT_FILES = rf"adapter_(model\.safetensors|model\.bin|config\.json)|{TOKENIZER_FILES}"


def main(
    out_dir: Path,
    base_model: str,
    lora_path: Path = Path("out/lora/alpaca"),
    pretrained_path: Path | None = None,
    tokenizer_path: Path | None = None,
    lora_alpha: float | None = None,
    force: bool = False,
) -> None:
    """Write adapter_model.safetensors, adapter_config.json, and the tokenizer with the template of the training.

    Args:
        out_dir: The folder to write, for `PeftModel.from_pretrained(model, out_dir)`.
        base_model: The Hugging Face name or folder of the base model, to be noted in adapter_config.json.
        lora_path: The file that finetune_lora.py wrote, or the run's folder, whose best file is used.
        pretrained_path: The checkpoint of the base model. Default: checkpoints/lit-llama/7B, or else the model written
            last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        lora_alpha: Only for a file of the archived Lit-LLaMA, which did not store it.
        force: Use the file even if it was trained on a different base model of the same shape.
    """
    pretrained_path = find_model(pretrained_path)
    base = read_config(pretrained_path, read_file(pretrained_path, check_tensors=False))
    lora = read_finetuned(lora_path, "lora", lora_alpha, pretrained_path, force)
    tensors = to_peft(lora.tensors_for(base), base, lora.config)
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    with replacing_folder(out_dir, PEFT_FILES) as part:
        for name, text in hf_tokenizer(tokenizer, lora.prompt_style).items():
            write_file(part / name, text)
        write_safetensors(part / "adapter_model.safetensors", tensors)
        config = peft_config(lora.config, os.path.expanduser(base_model))
        write_file(part / "adapter_config.json", json.dumps(config, indent=2))
    print(f"Saved {out_dir}", file=sys.stderr)
    if base_is_nf4(lora):
        how = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
        print(f"The LoRA was trained on a 4-bit base: load the base with BitsAndBytesConfig({how})", file=sys.stderr)


def to_peft(state: Mapping[str, Tensor], base: LLaMAConfig, lora: LoRAConfig) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors for the LoRA parameters of a model."""
    result = {}
    for module, layer, rows_A, rows_B, n_head in parts(base, lora):
        A, B = state[f"{layer}.lora_A"][rows_A], state[f"{layer}.lora_B"][rows_B]
        result[f"{PREFIX}{module}.lora_A.weight"] = A.contiguous()
        result[f"{PREFIX}{module}.lora_B.weight"] = (halves_from_pairs(B, n_head) if n_head else B).contiguous()
    return result


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


if __name__ == "__main__":
    run(main)
