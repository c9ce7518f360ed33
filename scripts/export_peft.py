"""Export a LoRA file to the format of Hugging Face's PEFT, to be loaded onto the original Hugging Face model."""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from lit_llama.checkpoint import check_state, read_config, read_file, replacing, write_file
from lit_llama.cli import run
from lit_llama.lora import lora_shapes, read_lora
from lit_llama.peft_format import peft_config, to_peft


def main(
    out_dir: Path,
    base_model: str,
    lora_path: Path = Path("out/lora/alpaca/lit-llama-lora-finetuned.pth"),
    pretrained_path: Path = Path("checkpoints/lit-llama/7B/lit-llama.pth"),
    lora_alpha: float | None = None,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Args:
        out_dir: The folder to write, for `PeftModel.from_pretrained(model, out_dir)`.
        base_model: The Hugging Face name or folder of the base model, to be noted in adapter_config.json.
        lora_path: The file that finetune_lora.py wrote.
        pretrained_path: The checkpoint of the base model.
        lora_alpha: Only for a file of the archived Lit-LLaMA, which does not hold it.
    """
    base = read_config(pretrained_path, read_file(pretrained_path))
    config, state, _ = read_lora(lora_path, base, lora_alpha)
    check_state(lora_path, state, lora_shapes(base, config))
    tensors = to_peft(state, base, config)
    (out_dir / "adapter_config.json").unlink(missing_ok=True)  # it makes the folder valid, and is written last
    with replacing(out_dir / "adapter_model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    write_file(out_dir / "adapter_config.json", json.dumps(peft_config(config, base_model), indent=2))
    print(f"Saved {out_dir}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
