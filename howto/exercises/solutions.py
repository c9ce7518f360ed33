"""Solutions of exercises.py, each with the reason. Try first."""

from lit_llama.lora import LoRAConfig, lora_layers
from lit_llama.model import LLaMA

import torch
from torch import Tensor


def gradients(x: Tensor, dh: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """h = W x + s B u with u = A x, so dB = s dh u^T. What reaches u is s B^T dh, so dA = s B^T dh x^T."""
    dB = scaling * torch.outer(dh, A @ x)
    dA = scaling * torch.outer(B.T @ dh, x)
    return dA, dB


def stabilize_rank(model: LLaMA, config: LoRAConfig) -> None:
    """The scale is applied in one place, LoRALinear.scaling; forward and merge both read it.

    A sum of r terms that do not depend on each other grows like sqrt(r); dividing it by r makes it smaller as r grows.
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


def update(x: Tensor, A: Tensor, B: Tensor, scaling: float, qkv_sizes: tuple[int, int, int]) -> Tensor:
    """A has r rows for each target, so halves are right there. B has as many rows as the target: 576 and 192, not 384
    each. The wrong halves add up to the right size, which is why no error told."""
    n_query, n_key, n_value = qkv_sizes
    A_query, A_value = A.chunk(2)
    B_query, B_value = B.split((n_query, n_value))
    query = scaling * x @ A_query.T @ B_query.T
    value = scaling * x @ A_value.T @ B_value.T
    key = torch.zeros(*x.shape[:-1], n_key)
    return torch.cat((query, key, value), dim=-1)
