"""Factor arithmetic against the dense float64 update, which the code never forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi.adapters.algebra import (
    alive,
    amplification,
    concatenated,
    distance,
    entropy_rank,
    expected_similarity,
    inner,
    intruders,
    norm,
    product_svd,
    rank_for_energy,
    right_vectors,
    similarities,
    singular_values,
    stable_rank,
    truncated,
)


def pair(rank: int, out: int, inner_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inner_size, generator=generator), torch.randn(out, rank, generator=generator)


def dense(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * b.double() @ a.double()


def orthonormal(dimension: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, count, generator=generator, dtype=torch.float64)).Q


SIZES = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(rank=SIZES, out=SIZES, inside=SIZES, seed=st.integers(0, 99))
def test_the_decomposition_is_that_of_the_dense_update_for_any_shape(rank, out, inside, seed):
    a, b = pair(rank, out, inside, seed)
    svd, full = product_svd(a, b, -1.7), dense(a, b, -1.7)
    k = min(rank, out, inside)
    assert svd.u.shape == (out, k) and svd.s.shape == (k,) and svd.vh.shape == (k, inside)
    assert torch.allclose((svd.u * svd.s) @ svd.vh, full, atol=1e-12)
    assert torch.allclose(svd.s, torch.linalg.svdvals(full)[:k], atol=1e-12)
    assert torch.allclose(svd.u.t() @ svd.u, torch.eye(k).double(), atol=1e-12)
    assert torch.allclose(svd.vh @ svd.vh.t(), torch.eye(k).double(), atol=1e-12)
    assert torch.allclose(singular_values(a, b, -1.7), svd.s, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(out=SIZES, inside=SIZES, kept=st.integers(1, 7), seed=st.integers(0, 99))
def test_a_truncation_is_the_best_one_and_says_its_error_exactly(out, inside, kept, seed):
    a, b = pair(5, out, inside, seed)
    (small_a, small_b), error = truncated(product_svd(a, b, 2.5), kept)
    assert small_a.shape == (kept, inside) and small_b.shape == (out, kept)
    full = dense(a, b, 2.5)
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    best = (u[:, :kept] * s[:kept]) @ vh[:kept]
    assert torch.allclose(small_b @ small_a, best, atol=1e-10)
    assert error == pytest.approx(float((full - small_b @ small_a).norm()), abs=1e-10)
    assert error == pytest.approx(float(s[kept:].square().sum().sqrt()), abs=1e-10)


def test_balanced_factors_share_the_singular_values_equally():
    (a, b), _ = truncated(product_svd(*pair(4, 11, 7)), 3)
    assert torch.allclose(a @ a.t(), b.t() @ b, atol=1e-12)


def test_norms_inner_products_and_distances_are_those_of_the_dense_updates():
    one, other = pair(3, 11, 7, 1), pair(5, 11, 7, 2)
    x, y = dense(*one), dense(*other)
    assert norm(*one, scale=-2.0) == pytest.approx(2 * float(x.norm()), rel=1e-13)
    assert inner(one, other) == pytest.approx(float((x * y).sum()), rel=1e-12)
    assert distance(one, other, 0.3, 1.9) == pytest.approx(float((0.3 * x - 1.9 * y).norm()), rel=1e-12)
    a, b = concatenated([one, other], [0.3, -1.9])
    assert a.shape == (8, 7) and torch.allclose(b @ a, 0.3 * x - 1.9 * y, atol=1e-12)


def test_a_tiny_difference_of_large_updates_is_not_lost_in_cancellation():
    a, b = (t.double() * 1e4 for t in pair(3, 11, 7))
    moved = a.clone()
    moved[0, 0] += 1e-5
    wanted = float((b[:, :1] @ torch.full((1, 1), 1e-5, dtype=torch.float64)).norm())
    assert distance((a, b), (moved, b)) == pytest.approx(wanted, rel=1e-3)


def test_equal_spans_are_similar_by_one_and_orthogonal_ones_by_zero():
    basis = orthonormal(13, 8)
    mixed = basis[:, :4] @ orthonormal(4, 4, 3)  # another basis of the same span
    assert torch.allclose(similarities(basis[:, :4], basis[:, :4]), torch.ones(4, 4).double())
    assert float(similarities(basis[:, :4], mixed)[3, 3]) == pytest.approx(1.0, abs=1e-12)
    assert float(similarities(basis[:, :4], basis[:, 4:]).abs().max()) < 1e-20


def test_similarity_is_one_minus_the_squared_projection_distance_over_p_and_not_as_appendix_g_prints_it():
    u, v = orthonormal(13, 3, 1), orthonormal(13, 5, 2)
    phi = similarities(u, v)
    for i in range(1, 4):
        for j in range(1, 6):
            p = min(i, j)
            cosines = torch.linalg.svdvals(u[:, :i].t() @ v[:, :j])
            projection = math.sqrt(p - float(cosines.square().sum()))
            assert float(phi[i - 1, j - 1]) == pytest.approx(1 - projection**2 / p, abs=1e-12)


def test_random_subspaces_are_similar_by_max_over_dimension_on_average():
    dimension, i, j, draws = 24, 3, 7, 400
    found = torch.stack(
        [
            similarities(orthonormal(dimension, 8, 2 * n), orthonormal(dimension, 8, 2 * n + 1))[i - 1, j - 1]
            for n in range(draws)
        ]
    )
    error = float(found.std()) / math.sqrt(draws)
    assert abs(float(found.mean()) - expected_similarity(i, j, dimension)) < 4 * error
    assert abs(float(found.mean()) - i / dimension) > 20 * error  # min in place of max would be seen


def test_right_vectors_are_those_of_the_decomposition():
    a, _ = pair(4, 1, 9)
    found = right_vectors(a)
    vh = torch.linalg.svd(a.double(), full_matrices=False)[2]
    assert found.shape == (9, 4)
    assert torch.allclose((vh @ found).abs(), torch.eye(4).double(), atol=1e-10)


def test_effective_ranks_of_flat_single_and_empty_spectra():
    flat, one, none = torch.ones(5), torch.tensor([3.0, 0.0, 0.0]), torch.zeros(4)
    assert (entropy_rank(flat), stable_rank(flat), alive(flat)) == (pytest.approx(5.0), pytest.approx(5.0), 5)
    assert (entropy_rank(one), stable_rank(one), alive(one)) == (pytest.approx(1.0), pytest.approx(1.0), 1)
    assert (entropy_rank(none), stable_rank(none), alive(none)) == (0.0, 0.0, 0)
    s = torch.tensor([4.0, 2.0, 2.0])
    assert entropy_rank(s) == pytest.approx(2**1.5) and stable_rank(s) == pytest.approx(1.5)
    assert alive(torch.tensor([1.0, 2e-6, 5e-7])) == 2


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.6399, 1), (0.6401, 2), (0.9599, 2), (0.9601, 3), (1.0, 3)])
def test_the_rank_for_an_energy_is_the_smallest_that_holds_it(share, rank):
    assert rank_for_energy(torch.tensor([16.0, 8.0, 1.0, 0.0]).double().sqrt(), share) == rank


def test_an_update_that_is_zero_keeps_rank_one():
    assert rank_for_energy(torch.zeros(3), 0.9) == 1


def test_amplification_has_the_figures_of_table_7():
    a, b = pair(3, 11, 7, 4)
    weight = torch.randn(11, 7, generator=torch.Generator().manual_seed(9))
    found = amplification(product_svd(a, b, 0.4), weight)
    u, _, vh = torch.linalg.svd(dense(a, b, 0.4), full_matrices=False)
    inside = float((u[:, :3].t() @ weight.double() @ vh[:3].t()).norm())
    assert found.update == pytest.approx(float(dense(a, b, 0.4).norm()))
    assert found.weight == pytest.approx(inside)
    assert found.factor == pytest.approx(found.update / inside)
    assert found.whole == pytest.approx(float(weight.norm()))


def test_the_random_level_of_amplification_is_the_mean_square_over_random_directions():
    weight = torch.randn(11, 7, generator=torch.Generator().manual_seed(9)).double()
    found = amplification(product_svd(*pair(3, 11, 7, 4)), weight)
    squares = [
        float((orthonormal(11, 3, 2 * n).t() @ weight @ orthonormal(7, 3, 2 * n + 1)).square().sum())
        for n in range(600)
    ]
    assert math.sqrt(sum(squares) / 600) == pytest.approx(found.random, rel=0.03)


def test_an_update_outside_the_weights_directions_is_amplified_without_bound_and_intrudes():
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(7)).double()
    u = torch.linalg.svd(weight)[0]  # its last five left-singular vectors are no direction of the weight's
    outside, along = u[:, 8:], u[:, :1]
    new = product_svd(torch.ones(1, 4) * 9, outside)
    found = amplification(new, weight)
    assert found.weight < 1e-12 < found.update and found.factor > 1e12
    assert intruders(new, weight, top=3) == 1
    assert intruders(product_svd(torch.ones(1, 4) * 1e-3, along), weight, top=3) == 0
