"""Drawing the next token: the right frequencies, the right cuts, one stream a row."""

from __future__ import annotations

import pytest
import torch

from lofi.errors import RequestError
from lofi.evaluate.sampling import Dice, Sampling, narrowed

SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]])


def kept(**options) -> list[int]:
    return narrowed(SCORES, Sampling(**options)).isfinite()[0].nonzero().flatten().tolist()


def test_the_draws_have_the_frequencies_of_the_softmax():
    dice = Dice(Sampling(temperature=2.0, seed=1), [0])
    drawn = torch.tensor([int(dice(None, SCORES).argmax()) for _ in range(6000)])
    expected = (SCORES[0] / 2).softmax(-1)
    found = drawn.bincount(minlength=5) / 6000
    assert (found - expected).abs().max() < 4 * (0.25 / 6000) ** 0.5


def test_top_k_keeps_the_likeliest():
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=0) == kept(top_k=99) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    # softmax: 0.644, 0.237, 0.087, 0.032, ~0
    assert kept(top_p=0.6) == [0]
    assert kept(top_p=0.7) == [0, 1]
    assert kept(top_p=0.9) == [0, 1, 2]
    assert kept(top_p=1e-9) == [0]


def test_rows_have_streams_of_their_own():
    scores = torch.zeros(3, 50)
    together = Dice(Sampling(seed=2), [4, 0, 7])(None, scores)
    alone = Dice(Sampling(seed=2), [7])(None, scores[:1])
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(Dice(Sampling(seed=3), [7])(None, scores[:1]), alone)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        Sampling(**options)
