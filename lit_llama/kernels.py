"""What is only for speed and memory: the same numbers as the plain formulas, in fewer passes over memory.

Shapes: N tokens, C embedding width, V vocabulary; any shape where none is given.
"""

from typing import Any

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


def rotate(pairs: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair (a, b) of pairs (..., 2) by the angle whose cosine and sine are in angles (..., 2).

    As a product of complex numbers, it takes a single pass; torch.compile and Apple's GPUs need it written out.
    """
    if torch.compiler.is_compiling() or pairs.device.type == "mps":
        (a, b), (cos, sin) = pairs.unbind(-1), angles.unbind(-1)  # (...) each
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1)  # (..., 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(angles))  # (..., 2)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. The backward pass computes silu(gate) again, so that only gate and up are kept for it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

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
