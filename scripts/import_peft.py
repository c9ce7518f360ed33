"""Import a LoRA that Hugging Face's PEFT has trained, for generate_lora.py and all others that take a LoRA file."""

import sys
from pathlib import Path

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.finetuned import describe, save_finetuned
from lit_llama.formats.peft import config_from_peft, from_peft
from lit_llama.formats.tokenizers import read_chat_template
from lit_llama.model_folder import find_model, own_template, read_config, suggest_script
from lit_llama.prompt import find_template, name_of
from lit_llama.storage.files import check_apart, read_file, read_json, read_safetensors
from lit_llama.storage.integrity import identity

from torch import Tensor


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


if __name__ == "__main__":
    run(main)
