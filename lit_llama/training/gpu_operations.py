"""What a GPU computes, in place of what a CPU computes otherwise, to count a training step's memory without a GPU."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F


def gpu_operations() -> Any:
    """A context in which operations of torch.nn.functional keep and move what a GPU's do."""
    operations = {"dropout": dropout, "rms_norm": rms_norm, "scaled_dot_product_attention": attention}
    return mock.patch.multiple(F, **operations)


def dropout(x: Tensor, p: float, training: bool, *_: Any) -> Tensor:
    """On a GPU: it keeps a mask of booleans, a CPU one of numbers."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """On a GPU: FlashAttention, or for float32 the memory-efficient kernel, which takes no grouped queries."""
    if mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if enable_gqa:
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, 0.0, is_causal, enable_gqa=True)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal)[0]


def rms_norm(x: Tensor, _shape: list[int], scale: Tensor, _eps: float) -> Tensor:
    """On a GPU: it keeps the norm of each row, a CPU all of x in float32."""
    return FusedRMSNorm.apply(x, scale)


class FusedRMSNorm(torch.autograd.Function):
    """Keeps and moves what a GPU's kernels for F.rms_norm do: one forward, one or two backward. Its values are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, _, _ = ctx.saved_tensors
        return grad + x, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
