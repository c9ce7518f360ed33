"""Exercises for howto/understand_lora.md. Edit this file, then check one of them, here the merge:

    pytest howto/exercises/test_exercises.py -k merge

Shapes, as in lit_llama/lora.py: r rank, C width of the input; B is always LoRA's matrix.
"""

from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMA

import torch
from torch import Tensor


def gradients(x: Tensor, dh: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """gradients: the gradients of A and B for one token, without autograd.

    Args:
        x: the input of the layer, (C,).
        dh: the gradient of the loss with respect to the layer's output h = W x + scaling B A x, (out,).
        A: (r, C).
        B: (out, r).
        scaling: alpha / r.

    Returns:
        dA (r, C) and dB (out, r).
    """
    raise NotImplementedError


def stabilize_rank(model: LLaMA, config: LoRAConfig) -> None:
    """scaling: after add_lora(model, config), scale the updates by alpha / sqrt(r) instead of alpha / r.

    This is rsLoRA (arXiv 2312.03732): with alpha fixed, the norm of the update no longer shrinks as r grows.
    `lora_layers` of lit_llama/lora.py gives the model's LoRA layers.
    """
    raise NotImplementedError


def merge(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """merge: W + scaling B A as a new tensor of W's dtype; W, A and B stay as they are.

    W (out, C) may be bfloat16. Round once, at the end.
    """
    raise NotImplementedError


def add_keys(A: Tensor, B: Tensor, new_A: Tensor, qkv_sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """keys: give keys an update, too, in a fused attention layer in which query and value have been trained.

    The model must not change by this: the update of the keys has to start at zero.

    Args:
        A: of query and value, (2 r, C).
        B: of query and value, (their rows, r).
        new_A: A of the keys, (r, C).
        qkv_sizes: the rows of queries, keys and values.

    Returns:
        A (3 r, C) and B (all rows, r) of a layer with the targets query, key, value, in this order.
    """
    raise NotImplementedError


def update(x: Tensor, A: Tensor, B: Tensor, scaling: float, qkv_sizes: tuple[int, int, int]) -> Tensor:
    """bug: what LoRA on query and value adds to the output of the fused layer, (..., all rows), zero for the keys.

    This code passed its review, since it is right for a model with as many key and value heads as query heads. For
    SmolLM2, with 9 query heads and 3 of the others, it is wrong, and no error tells. Find the bug and mend it.

    Args:
        x: (..., C).
        A: of query and value, (2 r, C).
        B: of query and value, (their rows, r).
        scaling: alpha / r.
        qkv_sizes: the rows of queries, keys and values.
    """
    A_query, A_value = A.chunk(2)
    B_query, B_value = B.chunk(2)
    query = scaling * x @ A_query.T @ B_query.T
    value = scaling * x @ A_value.T @ B_value.T
    key = torch.zeros(*x.shape[:-1], qkv_sizes[1])
    return torch.cat((query, key, value), dim=-1)
