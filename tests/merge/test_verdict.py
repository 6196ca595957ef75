"""The verdict's figures, from numbers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lofi.errors import ProofError
from lofi.merge.probes import Probes
from lofi.merge.verdict import Measured, judge, refuse_below

PROBES = Probes([[1, 2]], (), "by hand")
BASE = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
ADAPTED = torch.tensor([[0.0, 3.0, 2.0], [3.0, 0.0, 1.0]])


def verdict(merged=ADAPTED, losses=(None, None, None)):
    measured = [Measured(logits, rows) for logits, rows in zip((BASE, ADAPTED, merged), losses, strict=True)]
    return judge(*measured, PROBES)


def rows(per_token: float, n: int = 40, spread: float = 0.1) -> np.ndarray:
    noise = np.random.default_rng(3).normal(0, spread, n)
    tokens = np.arange(3, 3 + n)
    return np.stack([(per_token + noise) * tokens, tokens], axis=1)


def test_an_exact_merge_has_no_error():
    found = verdict()
    assert (found.max_logit_error, found.mean_logit_error, found.kl, found.top1_agreement) == (0, 0, 0, 1)
    assert found.adapter_effect == pytest.approx(3 / 6) and found.share_kept is None


def test_errors_agreement_and_divergence_are_what_the_formulas_say():
    found = verdict(torch.tensor([[0.0, 1.5, 2.0], [3.0, 0.0, 1.0]]))
    assert found.max_logit_error == pytest.approx(1.5) and found.mean_logit_error == pytest.approx(1.5 / 6)
    assert found.top1_agreement == 0.5
    p, q = ([math.exp(x) for x in row] for row in ((0.0, 3.0, 2.0), (0.0, 1.5, 2.0)))
    kl = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert found.kl == pytest.approx(kl / 2)


def test_the_share_is_the_part_of_the_drop_that_is_left():
    found = verdict(losses=(rows(3.0), rows(1.0), rows(1.5)))
    assert found.share_kept is not None and found.share_kept.value == pytest.approx(0.75)
    assert found.losses["merged"].value - found.losses["adapter"].value == pytest.approx(0.5)
    refuse_below(found, 0.7)
    with pytest.raises(ProofError, match=r"keeps 0\.750 of the adapter's gain, less than min_kept 0\.8"):
        refuse_below(found, 0.8)


def test_a_drop_that_may_be_zero_has_no_share():
    base = rows(2.0)
    adapted = base + np.stack([np.where(np.arange(len(base)) % 2, 3.0, -3.1), np.zeros(len(base))], axis=1)
    found = verdict(losses=(base, adapted, adapted))
    assert found.share_kept is None and found.losses
    row = next(row for row in found.rows() if row["metric"] == "share_kept")
    assert row["value"] is None and row["n"] == 40
    refuse_below(found, None)
    with pytest.raises(ProofError, match="cannot be told from 0"):
        refuse_below(found, 0.1)


def test_a_merged_model_that_says_nan_is_refused():
    with pytest.raises(ProofError, match="not finite"):
        verdict(ADAPTED * float("nan"))
