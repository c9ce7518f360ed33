"""The fast forms of functions against the plain ones, values and gradients."""

from typing import Any

from lit_llama import kernels
from lit_llama.kernels import CHUNK, SwiGLU, attention, matrix_vector, rotate, summed_cross_entropy
from lit_llama.lora import LoRAConfig, LoRALinear
from lit_llama.model import Linear

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

C, V = 16, 48


def make_head(kind: str) -> nn.Module:
    head = Linear(C, V)
    if kind == "lora":
        head = LoRALinear(head, {"head": V}, LoRAConfig(r=4, dropout=0.0, targets=("head",)))
        nn.init.normal_(head.lora_B)
    head.weight.requires_grad_(kind == "trained")
    return head


def gradients(loss: Tensor, x: Tensor, head: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *(p for p in head.parameters() if p.requires_grad)]))


def test_swiglu_and_its_gradients_are_those_of_the_formula() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(SwiGLU.apply(gate, up), gate * gate.sigmoid() * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))


@pytest.mark.parametrize("is_compiling", [False, True])
def test_rotate_and_its_gradient_are_those_of_the_formula(is_compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    n, angle = 2, torch.randn(4, 5)  # of 3 heads of 5 pairs, at 4 places
    matrix = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).view(4, 1, 5, 2, 2)
    angles = torch.stack((angle.cos(), angle.sin()), -1)
    x, weights = torch.randn(2, 4, 30, requires_grad=True), torch.randn(2, 4, 30)
    heads = x.unflatten(-1, (3, 5, 2))
    rotated = (matrix @ heads[..., :n, :, :].unsqueeze(-1)).squeeze(-1)
    expected = torch.cat((rotated, heads[..., n:, :, :]), -3).flatten(-3)
    found = rotate(x.clone(), angles, n)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    low = rotate(x.detach().bfloat16(), angles, n)
    torch.testing.assert_close(low, expected.bfloat16(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("masked", [False, True])
def test_groups_become_sequences_where_no_fused_kernel_takes_them(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = (torch.randn(2, 1, 5, 5) > 0).tril() | torch.eye(5, dtype=torch.bool) if masked else None
    expected = attention(q, k, v, mask)
    given: list[tuple[torch.Size, bool]] = []
    sdpa = F.scaled_dot_product_attention

    def note(*arguments: Any, **options: Any) -> Tensor:
        given.append((arguments[1].shape, options["enable_gqa"]))
        return sdpa(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    monkeypatch.setattr(kernels, "takes_groups", lambda *_: False)
    torch.testing.assert_close(attention(q, k, v, mask), expected)
    assert given == [((4, 3, 5, 8), False)]


@pytest.mark.parametrize("n", [0, 1, CHUNK, 2 * CHUNK + 7])
@pytest.mark.parametrize("kind", ["frozen", "trained", "lora"])
def test_the_summed_cross_entropy_is_that_of_all_logits_at_once(kind: str, n: int) -> None:
    head, x, targets = make_head(kind), torch.randn(n, C, requires_grad=True), torch.randint(V, (n,))
    loss, plain = summed_cross_entropy(head, x, targets), F.cross_entropy(head(x), targets, reduction="sum")
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(loss / 3, x, head), gradients(plain / 3, x, head))
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(head, x, targets), plain)


def test_gradients_of_chunks_are_summed_in_float32() -> None:
    head, x, targets = make_head("trained"), torch.randn(40 * CHUNK, C), torch.randint(V, (40 * CHUNK,))
    whole = torch.autograd.grad(F.cross_entropy(head(x), targets, reduction="sum"), head.weight)[0]
    head = head.to(torch.bfloat16)
    loss = summed_cross_entropy(head, x.bfloat16(), targets)
    (found,) = torch.autograd.grad(loss, [head.weight])
    assert (found.float() - whole).norm() < 0.01 * whole.norm()


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), 0)
        return out


def test_only_a_chunk_of_logits_ever_exists() -> None:
    head, n = make_head("lora"), 20 * CHUNK
    x, targets = torch.randn(n, C, requires_grad=True), torch.randint(V, (n,))
    with Largest() as largest:
        summed_cross_entropy(head, x, targets).backward()
    assert largest.numel == n * C  # the gradient of x
    assert CHUNK * V < n * C < n * V


def test_a_matrix_vector_product_in_blocks_is_the_product() -> None:
    x, weight = torch.randn(1, 1, C), torch.randn(V, C)
    torch.testing.assert_close(matrix_vector(x, weight), F.linear(x, weight))
