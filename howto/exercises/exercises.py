"""Nine exercises on LoRA: howto/exercises/README.md. Edit this file, then check one of them, here the merge:

    pytest howto/exercises/test_exercises.py -k merge

Shapes, as in lit_llama/lora.py: r rank, C width of the input; B is always LoRA's matrix.
"""

from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMA

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """layer: a frozen linear layer with a LoRA update, h = W x + (alpha / r) B A x.

    Only A (r, C) and B (out, r) are trained. As it is made, the layer computes what `linear` does.
    """

    def __init__(self, linear: nn.Linear, r: int, alpha: float) -> None:  # noqa: ARG002
        super().__init__()
        self.linear = linear
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., out)."""
        raise NotImplementedError


def predict(shapes: list[tuple[int, int]], r: int) -> tuple[int, int, str]:
    """predict: before anything runs, what does training LoRA on linear layers of these shapes (out, C) take?

    Returns:
        How many parameters are trained; how many bytes they, their gradients and AdamW's two moments take, all in
        float32; and which of "A" and "B" a first step of AdamW moves (without weight decay).
    """
    raise NotImplementedError


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


def phi(A: Tensor, other: Tensor, i: int, j: int) -> float:
    """phi: how much of the first i directions that A reads lies within the first j that the other reads, from 0 to 1.

    The directions of A (r, C) are its right singular vectors, the strongest first: section 7.2 of the LoRA paper has
    the formula. Then train with two seeds and use it on `lora_A` of both files: is phi(1, 1) far above 1 / C?
    """
    raise NotImplementedError


def update(x: Tensor, A: Tensor, B: Tensor, scaling: float, qkv_sizes: tuple[int, int, int]) -> Tensor:
    """bug: what LoRA on query and value adds to the output of the fused layer, (..., all rows), zero for the keys.

    This code passed its review, since it is right for a model with as many key and value heads as query heads, in
    float32 on a CPU. For SmolLM2, with 9 query heads and 3 of the others, it is wrong, and no error tells; in bfloat16
    it returns another type. Find both bugs and mend them.

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


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], rate: float) -> None:
    """loop: one AdamW step for each of the batches (x, y), on the mean squared error; only A and B may change.

    `model` has parameters whose names contain lora_A or lora_B, and others, which must stay as they are, bit for bit.
    Three things are wrong here; the loss falls all the same.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=10 * rate)
    for x, y in batches:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
