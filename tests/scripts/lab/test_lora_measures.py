"""The measures of updates against numpy, the papers' formulas written out, and PEFT."""

import re

import numpy as np
import peft
import pytest
import torch
from lora_measures import (
    amplification,
    energy,
    nearest_cosines,
    rank_of_energy,
    similarity_by_chance,
    subspace_similarity,
    svd,
    svd_of_product,
    truncate,
)
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

OUT, IN, R = 24, 18, 5


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(OUT, R), torch.randn(R, IN)


def test_svd_of_a_product_equals_numpy_on_the_whole_matrix() -> None:
    B, A = factors()
    parts = svd_of_product(B, A)
    U, S, Vh = np.linalg.svd((B @ A).numpy(), full_matrices=False)
    np.testing.assert_allclose(parts.S, S[:R], rtol=1e-4)
    np.testing.assert_allclose(np.abs((U[:, :R] * parts.U.numpy()).sum(0)), np.ones(R), atol=1e-4)  # but for the sign
    np.testing.assert_allclose(np.abs((Vh[:R].T * parts.V.numpy()).sum(0)), np.ones(R), atol=1e-4)
    torch.testing.assert_close(truncate(parts, R), B @ A, atol=1e-4, rtol=1e-4)


def test_truncation_leaves_the_smallest_singular_values_out() -> None:
    matrix = torch.randn(OUT, IN)
    S = np.linalg.svd(matrix.numpy(), compute_uv=False)
    for r in (1, 4, IN):
        rest = matrix - truncate(svd(matrix), r)
        np.testing.assert_allclose(rest.norm(), np.sqrt((S[r:] ** 2).sum()), atol=1e-4)
        assert energy(svd(matrix).S, r) == pytest.approx((S[:r] ** 2).sum() / (S**2).sum(), rel=1e-5)


def test_rank_of_energy_is_the_first_that_holds_enough() -> None:
    S = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [rank_of_energy(S, part) for part in (0.5, 0.9, 0.93, 1.0)] == [1, 2, 3, 3]


def test_subspace_similarity_is_the_formula_of_the_paper() -> None:
    X, Y = (np.linalg.qr(np.random.default_rng(seed).normal(size=(20, n)))[0] for seed, n in ((0, 3), (1, 6)))
    phi = subspace_similarity(torch.from_numpy(X), torch.from_numpy(Y))
    for i in range(1, 4):
        for j in range(1, 7):
            expected = np.linalg.norm(X[:, :i].T @ Y[:, :j], "fro") ** 2 / min(i, j)
            assert float(phi[i - 1, j - 1]) == pytest.approx(expected)
    X = torch.from_numpy(X)
    assert float(subspace_similarity(X, X[:, [2, 0, 1]])[2, 2]) == pytest.approx(1)


def test_similarity_by_chance_is_the_mean_over_random_subspaces() -> None:
    torch.manual_seed(1)
    values = [subspace_similarity(svd(torch.randn(30, 4)).U, svd(torch.randn(30, 9)).U)[3, 8] for _ in range(300)]
    assert float(torch.stack(values).mean()) == pytest.approx(similarity_by_chance(4, 9, 30), rel=0.05)


def test_amplification_is_the_formula_of_the_paper() -> None:
    (B, A), W = factors(), torch.randn(OUT, IN)
    U, _, Vh = np.linalg.svd((B @ A).numpy(), full_matrices=False)
    for r in (1, R):
        of_W = np.linalg.norm(U[:, :r].T @ W.numpy() @ Vh[:r].T)
        of_update = np.linalg.norm((B @ A).numpy())
        expected = (of_update, of_W, of_update / of_W)
        assert amplification(W, svd_of_product(B, A), r) == pytest.approx(expected, rel=1e-3)


class OneLayer(nn.Module):
    def __init__(self, W: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)
        self.layer.weight.data = W


@pytest.mark.parametrize("size", [0.02, 0.3, 3.0])
def test_intruders_are_as_many_as_peft_finds(size: float) -> None:
    (B, A), W = factors(), torch.randn(OUT, IN)
    model = peft.get_peft_model(OneLayer(W.clone()), peft.LoraConfig(r=R, lora_alpha=R, target_modules=["layer"]))
    layer = model.base_model.model.layer
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, size * B
    said: list[str] = []
    reduce_intruder_dimension(model, top_k=6, threshold_epsilon=0.5, logging_sink=said.append)
    theirs = re.search(r"Intruders: (\d+)", said[0])
    assert int((nearest_cosines(svd(W).U, W + size * B @ A, k=6) < 0.5).sum()) == (int(theirs[1]) if theirs else 0)


def test_a_new_direction_is_near_none_of_the_old_ones() -> None:
    W = torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.1]))
    W = torch.cat([W, torch.zeros(2, 4)])  # W writes to the first four directions of six
    updated = W.clone()
    updated[5, 3] = 10.0  # a strong new one, in a direction to which W does not write
    torch.testing.assert_close(
        nearest_cosines(svd(W).U, updated, k=3), torch.tensor([0.0, 1.0, 1.0]), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(nearest_cosines(svd(W).U, 2 * W, k=3), torch.ones(3))
