"""The measures of updates against numpy and the paper's formulas written out."""

import numpy as np
import pytest
import torch
from lora_measures import (
    amplification,
    energy,
    rank_of_energy,
    similarity_by_chance,
    subspace_similarity,
    svd,
    svd_of_product,
    truncate,
)

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
