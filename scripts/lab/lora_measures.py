"""What can be measured of a weight update: rank, directions, amplification. Tensors in, numbers out.

Sections are those of the LoRA paper (Hu et al. 2021, arXiv 2106.09685). An update of rank r is given by its factors
B (out, r) and A (r, in), the scale alpha / r within one of them, and is never multiplied out: a QR decomposition of
each leaves a core of r x r, so that a 7B model's matrices take milliseconds.

Shapes: d = min(out, in). U (out, k) holds left singular vectors as columns, the directions that an update writes to;
V (in, k) the right ones, the directions that it reads from; S (k,) the singular values, the largest first.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SVD(NamedTuple):
    """U diag(S) V^T."""

    U: Tensor
    S: Tensor
    V: Tensor


def svd(matrix: Tensor) -> SVD:
    """Of a whole matrix (out, in); k = d."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return SVD(U, S, Vh.mT)


def svd_of_product(B: Tensor, A: Tensor) -> SVD:
    """Of B A without multiplying it out; k = r."""
    Q_B, R_B = torch.linalg.qr(B)  # (out, r), (r, r)
    Q_A, R_A = torch.linalg.qr(A.mT)  # (in, r), (r, r)
    U, S, V = svd(R_B @ R_A.mT)  # of the core (r, r)
    return SVD(Q_B @ U, S, Q_A @ V)


def truncate(parts: SVD, r: int) -> Tensor:
    """The matrix (out, in) of rank r that is nearest to U S V^T (Eckart and Young 1936)."""
    return parts.U[:, :r] * parts.S[:r] @ parts.V[:, :r].mT


def energy(S: Tensor, r: int) -> float:
    """The part of the squared Frobenius norm that the r largest singular values hold, from 0 to 1."""
    squares = S.double().square()
    return float(squares[:r].sum() / squares.sum())


def rank_of_energy(S: Tensor, part: float) -> int:
    """How many singular values it takes to hold this part of the squared Frobenius norm."""
    squares = S.double().square()
    return int((squares.cumsum(0) < part * squares.sum()).sum()) + 1


def subspace_similarity(X: Tensor, Y: Tensor) -> Tensor:
    """phi(i, j) of section 7.2 for all i and j, (k_X, k_Y), from 0 (orthogonal) to 1 (one contains the other).

    ||X_i^T Y_j||_F^2 / min(i, j), where X_i and Y_j are the first i and j orthonormal columns of X and Y. Element
    [i - 1, j - 1] of the result is phi(i, j).
    """
    overlap = (X.mT @ Y).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=X.device) for n in overlap.shape)
    return overlap / torch.minimum(i[:, None], j)


def similarity_by_chance(i: int, j: int, n: int) -> float:
    """The mean of phi(i, j) for random subspaces of n dimensions."""
    return max(i, j) / n


def amplification(W: Tensor, update: SVD, r: int) -> tuple[float, float, float]:
    """Section 7.3: the norm of the update, that of W within its top r directions, and the factor between the two.

    ||dW||_F, ||U^T W V||_F and their quotient, with the first r columns of U and V.
    """
    of_update = float(update.S.norm())
    of_W = float((update.U[:, :r].mT @ W @ update.V[:, :r]).norm())
    return of_update, of_W, of_update / of_W
