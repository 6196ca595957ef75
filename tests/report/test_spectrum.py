"""The spectrum of an update equals that of the full matrix, which is never formed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lofi.adapters.config import LoraConfig
from lofi.report.spectrum import Update, singular_values, updates_of


def factors(rank: int, out: int, inner: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator)


def a_folder(record: dict | None = None, **config) -> SimpleNamespace:
    tensors = {}
    for number, layer in enumerate((10, 2)):
        a, b = factors(3, 11, 7, number)
        tensors |= {f"base_model.model.h.{layer}.q.lora_A.weight": a, f"base_model.model.h.{layer}.q.lora_B.weight": b}
    a, b = factors(3, 5, 29)
    tensors |= {"base_model.model.wte.lora_embedding_A": a, "base_model.model.wte.lora_embedding_B": b}
    tensors["base_model.model.score.weight"] = torch.ones(2, 7)
    return SimpleNamespace(tensors=tensors, record=record or {}, config=LoraConfig(r=3, lora_alpha=12, **config))


@pytest.mark.parametrize(("out", "inner"), [(11, 7), (5, 13), (2, 9)])
def test_the_values_are_those_of_the_full_matrix(out, inner):
    a, b = factors(3, out, inner)
    full = torch.linalg.svdvals(-2.5 * b.double() @ a.double())
    found = singular_values(a, b, -2.5)
    assert torch.allclose(torch.tensor(found), full[: len(found)].float(), rtol=1e-5)
    assert full[len(found) :].sum() < 1e-10
    assert not torch.allclose(torch.tensor(singular_values(a, b, -2.4)), full[: len(found)].float(), rtol=1e-5)


def test_every_pair_is_found_in_natural_order_and_heads_are_no_updates():
    found = updates_of(a_folder())
    assert [update.path for update in found] == ["h.2.q", "h.10.q", "wte"]
    assert [update.shape for update in found] == [(11, 7), (11, 7), (5, 29)]
    assert {update.scale for update in found} == {4.0}


def test_the_scale_is_what_the_record_states_else_what_the_config_gives():
    assert updates_of(a_folder({"scale": {"h.2.q": 0.5}}))[0].scale == 0.5
    assert updates_of(a_folder(alpha_pattern={"h.10.q": 6}))[1].scale == 2.0
    assert updates_of(a_folder(use_rslora=True))[0].scale == pytest.approx(12 / 3**0.5)


def test_directions_count_what_carries_nine_tenths_of_the_squared_norm():
    def of(*values: float) -> int:
        return Update("m", (4, 4), 4, 1.0, values).directions

    assert of(3.0, 0.1, 0.1) == 1
    assert of(1.0, 1.0, 1.0, 1.0) == 4
    assert of(2.0, 1.0) == 2
    assert of(0.0, 0.0) == 0
    assert Update("m", (4, 4), 4, 1.0, (3.0, 4.0)).norm == 5.0
