"""What can be said of updates s B A from their factors alone: spectra, sums, distances, subspaces.

Factors in, factors and numbers out: no (O, I) matrix is ever formed, except W, which the caller has. A pair is (A, B)
with A (R, I) and B (O, R) as PEFT stores them; all arithmetic is float64, whatever the factors are held in.
Knows torch only. Knows not  adapters, folders or models. Rejected: a randomised SVD of the product (QR of the factors
is exact and costs (O + I) R^2), and norms of differences as sqrt(|x|^2 - 2 <x, y> + |y|^2), which cancel: a difference
is a pair of factors itself, and its own singular values are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A (R, I) and B (O, R)."""
DEAD = 1e-6
"""A direction is dead whose singular value is below this share of the largest: float32 cannot tell it from none."""


class Svd(NamedTuple):
    """U (O, K), S (K,) descending, Vh (K, I) with U diag(S) Vh = s B A and K = min(R, O, I); float64."""

    u: Tensor
    s: Tensor
    vh: Tensor


class Amplification(NamedTuple):
    """The figures of one update beside its weight W, as in table 7 of the LoRA paper."""

    update: float
    """||dW||_F."""
    weight: float
    """||U^T W V^T||_F: what of W lies in the directions of the update."""
    random: float
    """The same in as many random directions: sqrt(K K / (O I)) ||W||_F, in the root of the mean square."""
    whole: float
    """||W||_F."""

    @property
    def factor(self) -> float:
        """||dW||_F / ||U^T W V^T||_F; infinite where W has nothing in these directions."""
        return self.update / self.weight if self.weight else math.inf


def product_svd(a: Tensor, b: Tensor, scale: float = 1.0) -> Svd:
    """The singular value decomposition of scale B A from the R x R core of its factors.

    B = Qb Rb, A^T = Qa Ra, s Rb Ra^T = U' S V'^T  =>  U = Qb U', V = Qa V'
    Shapes  a (R, I), b (O, R) -> U (O, K), S (K,), Vh (K, I), K = min(R, O, I)
    Exact   to float64 rounding: Qa and Qb have orthonormal columns
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().t())
    u, s, vh = torch.linalg.svd(scale * rb @ ra.t(), full_matrices=False)
    return Svd(qb @ u, s, vh @ qa.t())


def singular_values(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """S of `product_svd` alone, (K,) descending."""
    core_b = torch.linalg.qr(b.double(), mode="r").R
    core_a = torch.linalg.qr(a.double().t(), mode="r").R
    return torch.linalg.svdvals(scale * core_b @ core_a.t())


def truncated(svd: Svd, rank: int) -> tuple[Pair, float]:
    """The best approximation of a given rank as balanced factors, and its exact error in the Frobenius norm.

    B = U_k sqrt(S_k), A = sqrt(S_k) V_k^T; error = sqrt(sum of the dropped S^2)   Eckart and Young (1936)
    Shapes  A (rank, I), B (O, rank) in float64; where the product has fewer directions the rest is zero
    """
    u, s, vh = svd
    root = s[:rank].sqrt()
    a = torch.zeros(rank, vh.shape[1], dtype=torch.float64)
    b = torch.zeros(u.shape[0], rank, dtype=torch.float64)
    a[: len(root)] = root[:, None] * vh[:rank]
    b[:, : len(root)] = u[:, :rank] * root
    return (a, b), float(s[rank:].square().sum().sqrt())


def rank_for_energy(s: Tensor, share: float) -> int:
    """The smallest rank whose singular values hold `share` of the squared norm; 1 for an update that is zero."""
    squares = s.double().square()
    total = float(squares.sum())
    if total == 0.0:
        return 1
    held = squares.cumsum(0) / total
    # 1.0 asks for all that is there; rounding of the sum must not ask for more than float64 can tell
    enough = (held >= share - 1e-15 * len(s)).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(s)


def concatenated(pairs: Sequence[Pair], scales: Sequence[float]) -> Pair:
    """One pair whose product is the sum of scale_i B_i A_i: A's stacked, scaled B's side by side; float64.

    Shapes  A_i (R_i, I), B_i (O, R_i) -> A (sum R, I), B (O, sum R)
    """
    a = torch.cat([a.double() for a, _ in pairs])
    b = torch.cat([scale * b.double() for (_, b), scale in zip(pairs, scales, strict=True)], dim=1)
    return a, b


def norm(a: Tensor, b: Tensor, scale: float = 1.0) -> float:
    """||scale B A||_F, the root of the sum of the squared singular values."""
    return float(singular_values(a, b, scale).square().sum().sqrt())


def inner(one: Pair, other: Pair) -> float:
    """<B1 A1, B2 A2> = tr(A1^T B1^T B2 A2) = sum of (B1^T B2) * (A1 A2^T), by R1 x R2 matrices."""
    (a1, b1), (a2, b2) = one, other
    return float(((b1.double().t() @ b2.double()) * (a1.double() @ a2.double().t())).sum())


def distance(one: Pair, other: Pair, scale: float = 1.0, other_scale: float = 1.0) -> float:
    """||scale B1 A1 - other_scale B2 A2||_F, as the norm of the concatenated difference: nothing cancels."""
    return norm(*concatenated([one, other], [scale, -other_scale]))


def similarities(one: Tensor, other: Tensor) -> Tensor:
    """phi(i, j) of the spans of the first i columns of U and the first j of V, for every i and j.

    phi = ||U_i^T V_j||_F^2 / min(i, j)   LoRA (arXiv 2106.09685), sec. 7.2, eq. 4
    From 0 (orthogonal) to 1 (the smaller span lies in the larger). It is 1 - d^2 / p with p = min(i, j) and d the
    projection distance sqrt(p - ||U_i^T V_j||_F^2); appendix G prints (1 - d^2) / p, which is not 1 for equal spans.
    Shapes  U (D, Ku), V (D, Kv) with orthonormal columns, best first -> (Ku, Kv); entry [i - 1, j - 1] is phi(i, j)
    """
    sums = (one.double().t() @ other.double()).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1) for n in sums.shape)
    return sums / torch.minimum(i[:, None], j[None, :])


def expected_similarity(i: int, j: int, dimension: int) -> float:
    """E[phi(i, j)] of two random subspaces of R^d: E||U_i^T V_j||^2 = i j / d, so max(i, j) / d."""
    return max(i, j) / dimension


def right_vectors(matrix: Tensor) -> Tensor:
    """The right-singular vectors of one matrix (R, I), best first, as columns (I, min(R, I)): U_A of eq. 4."""
    q, r = torch.linalg.qr(matrix.double().t())
    return q @ torch.linalg.svd(r.t(), full_matrices=False)[2].t()


def alive(s: Tensor) -> int:
    """How many singular values are above `DEAD` times the largest; 0 for an update that is zero."""
    return int((s > DEAD * s.max()).sum()) if len(s) and float(s.max()) > 0 else 0


def entropy_rank(s: Tensor) -> float:
    """exp of the entropy of S / sum S: R for a flat spectrum, 1 for one direction, 0 for none.

    Roy and Vetterli, The effective rank (EUSIPCO 2007)
    """
    if not len(s) or float(s.max()) == 0.0:
        return 0.0
    share = s.double() / s.double().sum()
    return float(torch.special.entr(share).sum().exp())


def stable_rank(s: Tensor) -> float:
    """||M||_F^2 / ||M||_2^2 = sum S^2 / S_1^2; 0 for an update that is zero."""
    return float((s.double() / s.max()).square().sum()) if len(s) and float(s.max()) > 0 else 0.0


def amplification(svd: Svd, weight: Tensor) -> Amplification:
    """How much an update enlarges the directions it takes: ||dW||_F beside ||U^T W V^T||_F.

    LoRA (arXiv 2106.09685), sec. 7.3 and table 7, with the update's own directions; dead ones are left out
    Shapes  weight (O, I), any float dtype; U^T W V^T is (K, K)
    """
    k = alive(svd.s)
    w = weight.double()
    inside = float(torch.linalg.matrix_norm(svd.u[:, :k].t() @ w @ svd.vh[:k].t())) if k else 0.0
    whole = float(torch.linalg.matrix_norm(w))
    spread = k / math.sqrt(w.shape[0] * w.shape[1])
    return Amplification(float(svd.s.square().sum().sqrt()), inside, spread * whole, whole)


def intruders(svd: Svd, weight: Tensor, *, epsilon: float = 0.5, top: int = 10) -> int:
    """How many of the `top` left-singular vectors of W + dW are unlike every left-singular vector of W.

    y is an intruder where max_i |cos(y, x_i)| < epsilon   Shuttleworth et al. (arXiv 2410.21228), sec. 3
    Two full decompositions of (O, I) matrices: for small weights
    """
    w = weight.double()
    before = torch.linalg.svd(w, full_matrices=False)[0]
    after = torch.linalg.svd(w + (svd.u * svd.s) @ svd.vh, full_matrices=False)[0][:, :top]
    return int(((before.t() @ after).abs().amax(0) < epsilon).sum())
