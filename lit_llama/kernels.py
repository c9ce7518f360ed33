"""What is only for speed and memory: the same numbers as the plain formulas, in fewer passes over memory.

Shapes: N tokens, C embedding width, V vocabulary; any shape where none is given. Of attention: as in `model.py`.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 256  # tokens whose logits are held at once


def matrix_vector(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, weight) for a single token on a CPU, where a matrix-vector product would run on one core only."""
    blocks = weight.view(16, -1, weight.size(1)).mT  # of rows: as a batch of 16, they run on all cores
    return torch.bmm(x.expand(16, 1, -1), blocks).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear without bias, and fast for a single token on a CPU."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        is_plain = type(self.weight) is nn.Parameter  # not quantised
        if is_plain and x.device.type == "cpu" and x.numel() == self.in_features and self.out_features % 16 == 0:
            return matrix_vector(x, self.weight)
        return super().forward(x)


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which autocast is off. Its own takes as long as a small kernel, so it is only for where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def rotate(x: Tensor, angles: Tensor, n: int) -> Tensor:
    """Rotate each pair (a, b) of neighbours in the first n heads of x (B, T, all heads hs); the others stay.

    The cosines and sines are in angles (..., T, hs / 2, 2). The result takes the place of x, and a product of complex
    numbers takes a single pass; torch.compile and Apple's GPUs need it written out.
    """
    angles = angles.unsqueeze(-3)  # (..., T, 1, hs / 2, 2)
    if not torch.compiler.is_compiling() and x.device.type != "mps":
        return Rotation.apply(x, angles, n)
    pairs, (cos, sin) = x.unflatten(-1, (-1, *angles.shape[-2:])), angles.unbind(-1)  # (B, T, heads, hs / 2, 2), (...)
    a, b = pairs[..., :n, :, :].float().unbind(-1)  # (B, T, n, hs / 2)
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)  # (B, T, n, hs / 2, 2)
    return torch.cat((rotated, pairs[..., n:, :, :]), -3).flatten(-3)  # (B, T, all heads hs)


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.n = n
        ctx.mark_dirty(x)
        return Rotation.turn(x, torch.view_as_complex(angles), n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """`grad` has just been put together from those of queries, keys and values, so it may be overwritten, too."""
        return Rotation.turn(grad.contiguous(), torch.view_as_complex(*ctx.saved_tensors).conj(), ctx.n), None, None

    @staticmethod
    def turn(x: Tensor, angles: Tensor, n: int) -> Tensor:
        heads = x.unflatten(-1, (-1, 2 * angles.size(-1)))[..., :n, :]  # (B, T, n, hs)
        pairs = heads.float().unflatten(-1, (-1, 2))  # (B, T, n, hs / 2, 2)
        torch.view_as_complex(pairs).mul_(angles)
        if pairs.dtype != x.dtype:  # else it is x itself that has been turned
            heads.copy_(pairs.flatten(-2))
        return x


class Packed(NamedTuple):
    """Where sequences end that are packed one after the other into a single row."""

    lengths: list[int]
    ends: Tensor  # (n + 1,) of n sequences, after a 0; on the device
    longest: int

    @staticmethod
    def of(lengths: list[int], device: torch.device) -> "Packed":
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return Packed(lengths, ends.to(device, non_blocking=True), max(lengths))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Causal attention within each of the sequences: queries (1, nh, T, hs), keys and values (1, nkv, T, hs).

    FlashAttention takes them all at once, and compiles for all lengths alike.
    """
    if has_flash(q):
        rows = (tensor.squeeze(0).transpose(0, 1) for tensor in (q, k, v))  # (T, nh or nkv, hs)
        bounds = (packed.ends, packed.ends, packed.longest, packed.longest)
        y = torch.ops.aten._flash_attention_forward(*rows, *bounds, 0.0, True, False)[0]  # (T, nh, hs)
        return y.transpose(0, 1).unsqueeze(0)  # (1, nh, T, hs)
    parts = zip(*(tensor.split(packed.lengths, dim=2) for tensor in (q, k, v)), strict=True)
    return torch.cat([attention(*part) for part in parts], dim=2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = True) -> Tensor:
    """Attention of queries (B, nh, T, hs) to keys and values (B, nkv, S, hs); `is_causal` is for where T = S."""
    shape, is_grouped = q.shape, q.size(1) != k.size(1)
    if is_grouped and not takes_groups(q, mask):  # each group as a sequence of its own; its heads share one key
        if mask is not None and mask.dim() == 4:
            mask = mask.repeat_interleave(k.size(1), 0)  # (B nkv, 1, T, S)
        q = q.unflatten(1, (k.size(1), -1)).flatten(0, 1)  # (B nkv, nh / nkv, T, hs)
        k, v = (tensor.flatten(0, 1).unsqueeze(1).expand(-1, q.size(1), -1, -1) for tensor in (k, v))  # no copies
        is_grouped = False
    is_causal = is_causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=is_grouped).reshape(shape)


def takes_groups(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel takes fewer keys than queries: of a GPU's, FlashAttention alone, which takes no mask."""
    return not q.is_cuda or (mask is None and has_flash(q))


def has_flash(q: Tensor) -> bool:
    """Whether FlashAttention takes such queries (..., hs): in 16 bits, on an NVIDIA GPU from Ampere on."""
    fits = q.is_cuda and q.itemsize == 2 and q.size(-1) % 8 == 0 and q.size(-1) <= 256
    return fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. The backward pass computes silu(gate) again, so that only gate and up are kept for it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up  # not in place, of which torch.compile of 2.11 makes wrong gradients

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def summed_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of head(x) (N, V) with targets (N,), summed, in float32. Only a chunk of the logits ever exists.

    The gradients of x (N, C) and of the head's trained parameters are computed chunk by chunk, too, together with the
    loss; the backward pass only scales them.
    """
    if torch.is_grad_enabled():
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return SummedCrossEntropy.apply(head, x, targets, *trained)
    chunks = zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([F.cross_entropy(head(part).float(), ids, reduction="sum") for part, ids in chunks]).sum()


class SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: nn.Module, x: Tensor, targets: Tensor, *trained: Tensor) -> Tensor:
        loss, grad_x = x.new_zeros((), dtype=torch.float32), torch.empty_like(x)
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
        for part, ids, grad_part in zip(x.split(CHUNK), targets.split(CHUNK), grad_x.split(CHUNK), strict=True):
            part, ids = part.detach().requires_grad_(), ids.unsqueeze(1)  # (n, C), (n, 1)
            with torch.enable_grad():
                logits = head(part)  # (n, V)
            gradient = logits.detach().float().log_softmax(-1)  # (n, V), first the log-probabilities,
            loss -= gradient.gather(1, ids).sum()
            gradient.exp_().scatter_add_(1, ids, gradient.new_full(ids.shape, -1.0))  # then probabilities - one-hot
            found, *grads = torch.autograd.grad(logits, [part, *trained], gradient.to(logits.dtype))
            grad_part.copy_(found)
            for total, grad in zip(sums, grads, strict=True):
                total += grad
            del logits, gradient  # or the next chunk's would come beside them
        grads = [total.to(parameter.dtype) for total, parameter in zip(sums, trained, strict=True)]
        ctx.save_for_backward(grad_x, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *grads = (grad * tensor for tensor in ctx.saved_tensors)
        return None, grad_x, None, *grads
