"""Fold a LoRA file into its base: an ordinary checkpoint, for generate.py, export_hf.py and further finetuning."""

import sys
from pathlib import Path

from lit_llama.cli import run
from lit_llama.finetuned import base_is_nf4, read_finetuned
from lit_llama.lora import merge_lora
from lit_llama.model import Linear, LLaMA
from lit_llama.model_folder import find_model, load_model, save_model_folder
from lit_llama.prompt import Message, encode
from lit_llama.quantization import NF4Weight, quantize_blocks
from lit_llama.storage.files import check_apart
from lit_llama.tokenizer import find_tokenizer

import torch
from torch import Tensor, nn


def main(
    out_dir: Path,
    lora_path: Path = Path("out/lora/alpaca"),
    pretrained_path: Path | None = None,
    tokenizer_path: Path | None = None,
    lora_alpha: float | None = None,
    force: bool = False,
    prompt: str = "Please explain how weight decay works",
) -> None:
    """Merge in float32, and save in the dtype of the base model.

    If the LoRA was trained on a 4-bit base, the base is first rounded to 4 bits again.

    Args:
        out_dir: The model folder to write: lit-llama.pth, config.json (with the chat template) and the tokenizer.
        lora_path: The file that finetune_lora.py wrote, or the run's folder, whose best file is used.
        pretrained_path: The checkpoint of the base model. Default: checkpoints/lit-llama/7B, or else the model written
            last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        lora_alpha: Only for a file of the archived Lit-LLaMA, which did not store it.
        force: Use the file even if it was trained on a different base model of the same shape.
        prompt: An instruction to compare logits on.
    """
    pretrained_path = find_model(pretrained_path)
    check_apart(pretrained_path.parent, out_dir)
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    lora = read_finetuned(lora_path, "lora", lora_alpha, pretrained_path, force)
    nf4 = base_is_nf4(lora)
    model = load_model(pretrained_path, nf4=nf4).eval()
    tokenizer.check_fits(model.config.vocab_size)
    lora.add_to(model)
    idx = torch.tensor([encode(lora.prompt_style, [Message("user", prompt)], tokenizer).ids])
    apart = logits(model, idx)
    merge_lora(model)
    dequantize_blocks(model)  # those that had no update
    merged = logits(model, idx)
    save_model_folder(out_dir, model.state_dict(), model.config, tokenizer.files(), lora.prompt_style)
    change = (merged - apart).abs().max()
    print(f"Saved {out_dir}. Rounding changed the logits of a prompt by up to {change:.1e}", file=sys.stderr)
    if nf4:
        quantize_blocks(model, "cpu", None)
        change = (logits(model, idx) - merged).abs().max()
        print(f"To quantise it to 4 bits again would change them by up to {change:.1e}", file=sys.stderr)


@torch.no_grad()
def logits(model: LLaMA, idx: Tensor) -> Tensor:
    """Logits in the precision of the weights."""
    dtype = model.lm_head.weight.dtype
    with torch.autocast("cpu", dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
        return model(idx).float()


def dequantize_blocks(model: LLaMA) -> None:
    """Put ordinary matrices in place of quantised ones, with the same numbers."""
    for layer in model.transformer.h.modules():
        if isinstance(layer, Linear) and isinstance(layer.weight, NF4Weight):
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)


if __name__ == "__main__":
    run(main)
