"""Weights in 8 bits, for generation and evaluation: a fourth of the memory of float32, and of what a token reads of it.

A weight w of output channel i is stored as the integer q = round(w / s), where s is the largest |w| of the channel over
127, so that w differs from s q by at most s / 2. (Symmetric absmax, "vector-wise" in LLM.int8(), arXiv 2208.07339,
section 2; but here activations keep their precision.)
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llama.checkpoint import load_model
from lit_llama.errors import UserError
from lit_llama.files import page_out
from lit_llama.model import Linear, LLaMA

Quantization = Literal["int8"]
FEW = 32  # tokens, up to which the CPU's product of bfloat16 and int8 is faster than first unpacking the weight


class Int8Linear(nn.Module):
    """A linear layer of 8-bit weights, without gradients."""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        scale = (weight.abs().amax(1).float() / 127).to(
            torch.bfloat16
        )  # (out,); rounded first, so that q makes up for it
        scale = scale.clamp(min=torch.finfo(torch.bfloat16).tiny)  # for a channel of zeros
        q = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)  # (out, in)
        self.weight = nn.Buffer(q.to(device, torch.int8))
        self.scale = nn.Buffer(scale.to(device))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.numel() <= FEW * x.size(-1):
            rows = x.flatten(0, -2).bfloat16()  # (N, in)
            return torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, self.unpacked(x.dtype))  # (..., out)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers of a floating-point type."""
        return self.weight.to(dtype).mul_(self.scale[:, None])


def load_unsettled(
    path: Path, quantize: Quantization | None, dtype: torch.dtype, device: torch.device, nf4: bool = False
) -> LLaMA:
    """A model in `dtype`, or if it is to be quantised, which `settle` does, still mapped from its file."""
    return load_model(path, nf4=nf4) if quantize else load_model(path, dtype, device, nf4)


def settle(model: LLaMA, quantize: Quantization | None, dtype: torch.dtype, device: torch.device) -> None:
    """Quantise a model from `load_unsettled`, after merging, or else cast what was added to it to `dtype`."""
    if quantize:
        quantize_int8(model, dtype, device)
    else:
        model.to(dtype)


def quantize_int8(model: LLaMA, dtype: torch.dtype, device: torch.device) -> None:
    """Put 8-bit layers in place of all linear ones, one by one, and all else on the device, in `dtype`.

    Of a model whose weights are still mapped from their file (see `load_model`), no other copy is made. The embedding
    stays as it is, also where the head shared it.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is Linear:
            model.set_submodule(name, Int8Linear(layer.weight.detach(), device))
            page_out(layer.weight)
        elif isinstance(layer, Linear):
            raise UserError("only merged LoRA layers can be quantised; leave out --merge false, and give one LoRA file")
    for parameter in model.parameters():  # which 8-bit layers have none of
        parameter.data = parameter.data.to(device, dtype)
