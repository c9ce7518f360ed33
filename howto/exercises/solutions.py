"""Solutions of exercises.py, each with the reason. Try first."""

from lit_llama.lora import LoRAConfig, lora_layers
from lit_llama.model import LLaMA

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """B is zero, so the update is; A is random, or nothing would ever be learned. A x first: r numbers a token."""

    def __init__(self, linear: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scaling * (x @ self.A.T) @ self.B.T


def predict(shapes: list[tuple[int, int]], r: int) -> tuple[int, int, str]:
    """r (out + C) numbers a layer, four float32 each: weight, gradient, two moments. With B = 0, A has no gradient."""
    n = sum(r * (n_out + n_in) for n_out, n_in in shapes)
    return n, 16 * n, "B"


def gradients(x: Tensor, dh: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """h = W x + s B u with u = A x, so dB = s dh u^T. What reaches u is s B^T dh, so dA = s B^T dh x^T."""
    dB = scaling * torch.outer(dh, A @ x)
    dA = scaling * torch.outer(B.T @ dh, x)
    return dA, dB


def stabilize_rank(model: LLaMA, config: LoRAConfig) -> None:
    """The scale is applied in one place, LoRALinear.scaling; forward and merge both read it.

    A sum of r terms that do not depend on each other grows like sqrt(r), so dividing by r makes its norm fall with r.
    What they have in common, which lowers the loss, grows like r: for that, alpha / r is the scale without a trend.
    """
    for _, layer in lora_layers(model):
        layer.scaling = config.alpha / config.r**0.5


def merge(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """In bfloat16, B A would be rounded before it is added. In float32, only the sum is."""
    return (W.float() + scaling * B.float() @ A.float()).to(W.dtype)


def add_keys(A: Tensor, B: Tensor, new_A: Tensor, qkv_sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The blocks lie in the order query, key, value, in A as in B; B of the keys is zero, hence so is their update."""
    A_query, A_value = A.chunk(2)
    n_query, n_key, n_value = qkv_sizes
    B_query, B_value = B.split((n_query, n_value))
    B_key = B.new_zeros(n_key, B.size(1))
    return torch.cat((A_query, new_A, A_value)), torch.cat((B_query, B_key, B_value))


def phi(A: Tensor, other: Tensor, i: int, j: int) -> float:
    """||V_i^T V_j||^2 / min(i, j): the squared cosines add up to min(i, j) where one span contains the other."""
    first, second = (torch.linalg.svd(matrix, full_matrices=False)[2] for matrix in (A, other))  # (r, C)
    return float((first[:i] @ second[:j].T).square().sum() / min(i, j))


def update(x: Tensor, A: Tensor, B: Tensor, scaling: float, qkv_sizes: tuple[int, int, int]) -> Tensor:
    """A has r rows for each target, so halves are right there. B has as many rows as the target: 576 and 192, not 384
    each. The wrong halves add up to the right size, which is why no error told. The zeros take type and device of x."""
    n_query, n_key, n_value = qkv_sizes
    A_query, A_value = A.chunk(2)
    B_query, B_value = B.split((n_query, n_value))
    query = scaling * x @ A_query.T @ B_query.T
    value = scaling * x @ A_value.T @ B_value.T
    key = query.new_zeros(*x.shape[:-1], n_key)
    return torch.cat((query, key, value), dim=-1)


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], rate: float) -> None:
    """Nothing was frozen, the rate was ten times what was asked for, and gradients of earlier steps were added up."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
