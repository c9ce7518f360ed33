"""Weights in fewer bits: int8 for generation and evaluation, NF4 for a frozen base that LoRA or an adapter learns on.

int8: a weight w of output channel i is stored as the integer q = round(w / s), where s is the largest |w| of the
channel over 127, so that w differs from s q by at most s / 2. (Symmetric absmax, "vector-wise" in LLM.int8(), arXiv
2208.07339, section 2; but here activations keep their precision.)

NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3), by bitsandbytes: each block of 64 weights is divided
by its largest absolute value, and each weight becomes the nearest of 16 numbers, the quantiles of a normal
distribution. The largest values of 256 blocks are quantised again, to 8 bits: 4.13 bits a weight in all.
"""

import logging
from functools import cache
from typing import Any, Literal

from lit_llama.errors import UserError
from lit_llama.model import Linear, LLaMA
from lit_llama.storage.files import page_out

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

Quantization = Literal["int8", "nf4"]  # to be asked for when a model is loaded; NF4 also follows from a LoRA file
FEW = 32  # tokens, up to which the CPU's product of bfloat16 and int8 is faster than first unpacking the weight


class Int8Linear(nn.Module):
    """A linear layer of 8-bit weights, without gradients."""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        weight = weight.to(device)
        scale = (weight.abs().amax(1).float() / 127).bfloat16()  # (out,); rounded first, so that q makes up for it
        scale = scale.clamp(min=torch.finfo(torch.bfloat16).tiny)  # for a channel of zeros
        q = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)  # (out, in)
        self.weight = nn.Buffer(q.to(torch.int8))
        self.scale = nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.numel() <= FEW * x.size(-1):
            rows = x.flatten(0, -2).bfloat16()  # (N, in)
            return torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, self.unpacked(x.dtype))  # (..., out)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers of a floating-point type."""
        return self.weight.to(dtype).mul_(self.scale[:, None])


def quantize_int8(model: LLaMA, dtype: torch.dtype, device: torch.device) -> None:
    """Put 8-bit layers in place of all linear ones, one by one, and all else on the device, in `dtype`.

    Of weights that are still mapped from their file, no other copy is made. The embedding stays as it is.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is Linear:
            model.set_submodule(name, Int8Linear(layer.weight.detach(), device))
            page_out(layer.weight)
        elif isinstance(layer, Linear):
            raise UserError("only merged LoRA layers can be quantised; leave out --merge false, and give one LoRA file")
    for parameter in model.parameters():  # which 8-bit layers have none of
        parameter.data = parameter.data.to(device, dtype)


class NF4Weight(Tensor):
    """A matrix (out, in) that is stored in 4 bits a weight, and is dequantised by every operation that reads it.

    A matrix product keeps only what is stored; the backward pass dequantises it again, for the input's gradient.
    """

    packed: Tensor  # two weights a byte
    quant_state: Any  # the blocks' scales, bitsandbytes' QuantState

    @staticmethod
    def __new__(cls, packed: Tensor, quant_state: Any) -> "NF4Weight":
        return Tensor._make_wrapper_subclass(cls, quant_state.shape, dtype=quant_state.dtype, device=packed.device)

    def __init__(self, packed: Tensor, quant_state: Any) -> None:
        self.packed, self.quant_state = packed, quant_state

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4Weight":
        """The matrix `weight` (out, in), rounded to 4 bits a weight."""
        packed, state = bitsandbytes().functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return cls(packed, state)

    def dequantize(self) -> Tensor:
        """An ordinary tensor (out, in) in the dtype that was quantised."""
        return bitsandbytes().functional.dequantize_4bit(self.packed, self.quant_state)

    def stored(self) -> tuple[Tensor, ...]:
        """What takes memory: the weights, the scales of their blocks, and the scales of those."""
        return self.packed, self.quant_state.absmax, self.quant_state.state2.absmax

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear:
            x, weight = args[:2]
            return bitsandbytes().matmul_4bit(x, weight.packed.t(), quant_state=weight.quant_state)
        with torch._C.DisableTorchFunctionSubclass():  # which would make results NF4Weights, too
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].quant_state)
        plain = tree_map(lambda leaf: leaf.dequantize() if isinstance(leaf, cls) else leaf, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def quantize_blocks(model: LLaMA, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Quantise the matrices of all blocks, as QLoRA does, one by one on `device`; embedding and head stay as they are.

    `dtype` is what is quantised and computed in (None: as they are stored).
    """
    for layer in model.transformer.h.modules():
        if isinstance(layer, Linear):
            weight = NF4Weight.quantize(layer.weight.detach().to(device, dtype))
            layer.weight = nn.Parameter(weight, requires_grad=False)


def check_compilable(model: LLaMA) -> None:
    """Raise a UserError if matrices are quantised: torch.compile cannot trace bitsandbytes' products."""
    if any(isinstance(parameter, NF4Weight) for parameter in model.parameters()):
        raise UserError("a model with a 4-bit base cannot be compiled; leave out --compile")


@cache
def bitsandbytes() -> Any:
    """The library, which is an extra."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would recommend further packages
    try:
        import bitsandbytes
    except ImportError:
        raise UserError("a 4-bit base needs bitsandbytes; run: pip install -e '.[nf4]'") from None
    zeros = torch.zeros(64, device="cpu")
    bitsandbytes.functional.quantize_4bit(zeros, compress_statistics=True)  # makes tables, for all
    return bitsandbytes
