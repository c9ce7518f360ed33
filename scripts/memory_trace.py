"""A training step on tensors that have shapes but no data, to be watched: for `estimate_step` of memory_parts.py.

The step runs on the CPU; for a GPU, as that would compute it. Few blocks are run: all of a kind add the same.
"""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

from lit_llama import kernels
from lit_llama.data.batches import Batch, loss_sum
from lit_llama.model import LLaMA
from lit_llama.quantization import NF4Weight, quantize_blocks

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer


def for_all_blocks(llama: LLaMA, trace: Callable[[nn.ModuleList], Counter], n: int = 2) -> Counter:
    """What `trace` counts with all blocks, extrapolated from n of them and one more.

    The first trained block computes no gradient of its input. Each one after it adds the same, and so does each before.
    """
    blocks = llama.transformer.h
    is_trained = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    first = max(0, min([*is_trained, True].index(True), len(blocks) - n))
    few = total = trace(blocks[first : first + n])
    before, after = blocks[first - 1 : first + n], blocks[first : first + n + 1]
    for left, more in ((first, before), (len(blocks) - first - n, after)):
        if left > 0:
            found = trace(more)
            total = Counter({key: total[key] + left * (found[key] - few[key]) for key in total | found})
    return total


def shapes_of(llama: LLaMA, blocks: nn.ModuleList, dtype: torch.dtype) -> LLaMA:
    """A model like `llama` with these of its blocks, to be computed in `dtype`, without data in FakeTensorMode."""
    memo: dict[int, Any] = {}
    for parameter in llama.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    memo[id(llama.transformer.h)] = copy.deepcopy(blocks, memo)
    shapes = copy.deepcopy(llama, memo)
    if any(isinstance(parameter, NF4Weight) for parameter in llama.parameters()):
        quantize_blocks(shapes, "cpu", dtype)
    return shapes


def after_a_step(llama: LLaMA, make_optimizer: Callable[..., Optimizer], foreach: bool) -> Optimizer:
    """An optimizer with gradients and moments, as in most of a run. `foreach` is torch's default on a GPU."""
    optimizer = make_optimizer([parameter for parameter in llama.parameters() if parameter.requires_grad])
    group = optimizer.param_groups[0]
    group["foreach"] = foreach
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def take_step(
    llama: LLaMA, lengths: list[int], dtype: torch.dtype, optimizer: Optimizer, end_blocks: Callable[..., None]
) -> None:
    """An optimizer step on a micro-batch of records of these lengths; `end_blocks` is called when its blocks are done.

    What is left then are the embedding's gradient and the optimizer.
    """

    def watch(_module: nn.Module, _args: Any, embedded: Tensor) -> None:
        if embedded.requires_grad:
            embedded.register_hook(end_blocks)

    llama.transformer.wte.register_forward_hook(watch)
    compute_gradients(llama, lengths, dtype)
    end_blocks()
    optimizer.step()


def compute_gradients(llama: LLaMA, lengths: list[int], dtype: torch.dtype) -> None:
    """The forward and backward pass of records of these lengths, all of whose tokens are trained on."""
    select = torch.arange(sum(lengths))
    batch = Batch(torch.zeros_like(select).unsqueeze(0), lengths, select, torch.zeros_like(select))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = loss_sum(llama, batch)
    loss.backward()


def gpu_operations() -> Any:
    """A context in which operations keep and move what a GPU's do, not what a CPU's do."""
    stack = ExitStack()
    new = {"dropout": dropout, "rms_norm": FusedRMSNorm.rms_norm, "scaled_dot_product_attention": attention}
    stack.enter_context(mock.patch.multiple(F, **new))
    stack.enter_context(mock.patch.multiple(kernels, has_flash=has_flash, takes_groups=takes_groups))
    return stack


def has_flash(q: Tensor) -> bool:
    """Whether the GPU that there is has FlashAttention; of others, those that compute in bfloat16 have it."""
    is_new = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return q.itemsize == 2 and (is_new or q.dtype == torch.bfloat16)


def takes_groups(q: Tensor, mask: Tensor | None) -> bool:
    return mask is None and has_flash(q)


def dropout(x: Tensor, p: float, training: bool, *_: Any) -> Tensor:
    """On a GPU: it keeps a mask of booleans, a CPU one of numbers."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """On a GPU: FlashAttention, or the memory-efficient kernel, which takes no grouped queries."""
    if mask is None and has_flash(q):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    assert not enable_gqa
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal)[0]


class FusedRMSNorm(torch.autograd.Function):
    """On a GPU: it keeps the norm of each row, a CPU all of x in float32. One kernel forward, one or two backward."""

    @staticmethod
    def rms_norm(x: Tensor, _shape: list[int], scale: Tensor, _eps: float) -> Tensor:
        return FusedRMSNorm.apply(x, scale)

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, _, _ = ctx.saved_tensors
        return grad + x, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
