"""Similarities of two adapters' subspaces: each view against the dense updates, and what is left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lofi.adapters.config import LoraConfig
from lofi.errors import RequestError
from lofi.report.similarity import mean_view, similarities_of


def folder(seed: int, rank: int = 3, *, b_zero: bool = False, names: tuple[str, ...] = ("h.0.q", "h.1.q")):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, name in enumerate(names):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 13, generator=generator)
        b = torch.randn(7 + number, rank, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b * 0 if b_zero else b
    config = LoraConfig(r=rank, lora_alpha=5)
    return SimpleNamespace(path=f"seed {seed}", tensors=tensors, record={}, config=config)


def test_every_view_is_that_of_the_dense_updates():
    one, other = folder(1, 3), folder(2, 4)
    found = similarities_of(one, other)
    assert [each.path for each in found] == ["h.0.q", "h.1.q"]
    a1, a2 = (f.tensors["base_model.model.h.1.q.lora_A.weight"].double() for f in (one, other))
    b1, b2 = (f.tensors["base_model.model.h.1.q.lora_B.weight"].double() for f in (one, other))
    (u1, _, v1), (u2, _, v2) = (torch.linalg.svd(b @ a, full_matrices=False) for a, b in ((a1, b1), (a2, b2)))
    w1, w2 = (torch.linalg.svd(a, full_matrices=False)[2] for a in (a1, a2))
    views = found[1].views
    for i, j in ((1, 1), (2, 4), (3, 3)):
        p = min(i, j)
        for name, overlap in (("A", w1[:i] @ w2[:j].t()), ("input", v1[:i] @ v2[:j].t())):
            assert views[name].grid[i - 1][j - 1] == pytest.approx(float(overlap.square().sum()) / p)
        assert views["output"].grid[i - 1][j - 1] == pytest.approx(
            float((u1[:, :i].t() @ u2[:, :j]).square().sum()) / p
        )
    assert (views["A"].dimension, views["output"].dimension, views["A"].k) == (13, 8, 3)
    assert views["input"].null(2, 4) == 4 / 13
    x, y = b1 @ a1, b2 @ a2
    assert found[1].cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())))


def test_an_update_that_is_zero_has_only_the_view_of_its_a():
    found = similarities_of(folder(1), folder(2, b_zero=True))
    assert list(found[0].views) == ["A"] and found[0].cosine == 0.0


def test_the_mean_reaches_as_far_as_every_module_does_and_keeps_the_mean_null():
    found = similarities_of(folder(1, 3), folder(2, 4))
    mean = mean_view(found, "output")
    assert (len(mean.grid), len(mean.grid[0])) == (3, 4)
    assert mean.grid[1][2] == pytest.approx(sum(each.views["output"].grid[1][2] for each in found) / 2)
    assert mean.dimension == round(2 / (1 / 7 + 1 / 8))
    assert mean_view(similarities_of(folder(1), folder(2, b_zero=True)), "input") is None


def test_adapters_without_a_module_in_common_are_refused():
    with pytest.raises(RequestError, match="update no module of the same name and shape both"):
        similarities_of(folder(1), folder(2, names=("other.q",)))
