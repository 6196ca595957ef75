"""The next token: what each row asked for, drawn from its own stream, whatever the other rows ask for."""

from __future__ import annotations

import math

import pytest
import torch

from lofi.evaluate.sampling import Sampling, narrowed
from lofi.serve.request import Asked, Drawing
from lofi.serve.sampling import Sampler

V = 37


def asked(prompt=(5, 6), logprobs=None, **drawing) -> Asked:
    return Asked(prompt=prompt, logprobs=logprobs, drawing=Drawing(**drawing))


def scores(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(seats: int = 8, vocabulary: int = V) -> Sampler:
    return Sampler(seats=seats, vocabulary=vocabulary, device="cpu")


def draws(one: Asked, logits: torch.Tensor, count: int) -> torch.Tensor:
    """How often each token is drawn from the same logits (V,): shares (V,)."""
    chooser = sampler(1, len(logits))
    seat = chooser.enter(0, one)
    found = [chooser.choose(logits[None], [seat]).tokens[0] for _ in range(count)]
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / count


def test_rows_that_ask_for_nothing_get_their_likeliest_token():
    chooser, logits = sampler(), scores(5)
    rows = [chooser.enter(i, asked()) for i in range(5)]
    assert chooser.choose(logits, rows).tokens == logits.argmax(-1).tolist()


def test_drawn_tokens_have_the_probabilities_of_the_tempered_scores():
    logits = scores(1)[0, :6]
    expected = (logits / 1.7).softmax(-1)
    shares = draws(asked(temperature=1.7, seed=3), logits, 4000)
    assert (shares - expected).abs().max() < 0.03 < (logits.softmax(-1) - expected).abs().max()


@pytest.mark.parametrize("limits", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.8}, {"top_p": 1e-9}])
def test_top_k_and_top_p_keep_the_tokens_that_evaluation_keeps(limits):
    logits = scores(1, seed=2)[0]
    kept = narrowed(logits[None] / 1.3, Sampling(temperature=1.3, **limits))[0]
    shares = draws(asked(temperature=1.3, seed=1, **limits), logits, 1500)
    assert (shares > 0).tolist() == kept.isfinite().tolist()
    assert (shares - kept.softmax(-1)).abs().max() < 0.05


def test_a_flat_distribution_is_cut_as_exactly_as_a_steep_one():
    logits = torch.randn(600, generator=torch.Generator().manual_seed(4)) * 0.01  # top_p needs more than 256 tokens
    kept = narrowed(logits[None], Sampling(top_p=0.7))[0].isfinite()
    shares = draws(asked(temperature=1.0, top_p=0.7, seed=0), logits, 3000)
    assert not (shares[~kept] > 0).any()
    assert (shares[kept] > 0).float().mean() > 0.95


def test_a_seed_gives_the_same_draws_alone_and_among_others():
    logits = scores(4, seed=7)
    one = asked(temperature=1.5, top_p=0.95, seed=11)
    alone = sampler()
    seat = alone.enter(0, one)
    expected = [alone.choose(logits[:1], [seat]).tokens[0] for _ in range(20)]
    crowd = sampler()
    others = [crowd.enter(3, asked(temperature=0.9, seed=2)), crowd.enter(1, asked()),
              crowd.enter(6, asked(temperature=2.0, top_k=2, repetition_penalty=1.3))]  # fmt: skip
    seat, found = crowd.enter(2, one), []
    for step in range(20):
        rows = [*others[: step % 4], seat, *others[step % 4 :]]
        own = logits[torch.tensor([0 if row is seat else 1 for row in rows])]
        found.append(crowd.choose(own, rows).tokens[rows.index(seat)])
    assert found == expected
    assert len(set(found)) > 3


def test_without_a_seed_two_rows_draw_differently():
    logits = torch.zeros(2, 1000)
    chooser = sampler(2, 1000)
    rows = [chooser.enter(i, asked(temperature=1.0)) for i in range(2)]
    found = [chooser.choose(logits, rows).tokens for _ in range(8)]
    assert any(a != b for a, b in found)


def test_repetition_is_penalised_as_transformers_does():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits, history = scores(1, seed=5), [5, 6, 5]
    chooser = sampler()
    seat = chooser.enter(2, asked(prompt=tuple(history), repetition_penalty=1.8))
    for _ in range(6):
        expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([history]), logits.clone()).argmax().item()
        assert chooser.choose(logits, [seat]).tokens == [expected]
        history.append(expected)
    assert len(set(history)) > 4


def test_presence_and_frequency_count_the_answer_alone():
    logits = torch.full((1, V), -9.0)
    logits[0, 5], logits[0, 6], logits[0, 7] = 3.0, 2.4, 1.9
    chooser = sampler()
    seat = chooser.enter(0, asked(prompt=(5, 5, 5), presence_penalty=0.3, frequency_penalty=0.5))
    found, counts = [], dict.fromkeys(range(V), 0)
    for _ in range(7):
        worth = {t: logits[0, t].item() - 0.5 * n - 0.3 * (n > 0) for t, n in counts.items()}
        best = max(worth, key=worth.__getitem__)
        counts[best] += 1
        found.append(best)
    assert [chooser.choose(logits, [seat]).tokens[0] for _ in range(7)] == found
    assert found[0] == 5 and len(set(found)) == 3  # the prompt's tokens are not penalised, the answer's are


def test_a_seat_forgets_who_sat_there_before():
    logits = scores(1, seed=5)
    chooser = sampler(1)
    first = [chooser.choose(logits, [seat]).tokens[0] for seat in [chooser.enter(0, asked(frequency_penalty=2.0))] * 5]
    again = [chooser.choose(logits, [seat]).tokens[0] for seat in [chooser.enter(0, asked(frequency_penalty=2.0))] * 5]
    assert first == again and len(set(first)) > 1


def test_a_bias_raises_a_token_of_one_row_alone():
    logits = scores(3)
    chooser = sampler()
    rows = [
        chooser.enter(0, asked()),
        chooser.enter(1, asked(logit_bias=((9, 100.0), (4, -100.0)))),
        chooser.enter(2, asked()),
    ]
    best = logits.argmax(-1).tolist()
    assert chooser.choose(logits, rows).tokens == [best[0], 9, best[2]]


def test_log_probabilities_are_those_before_penalties_and_temperature():
    logits = scores(3, seed=8)
    chooser = sampler()
    rows = [chooser.enter(0, asked()), chooser.enter(1, asked(logprobs=2, logit_bias=((9, 100.0),), temperature=0.4)),
            chooser.enter(2, asked(logprobs=0))]  # fmt: skip
    found = chooser.choose(logits, rows)
    table = logits.log_softmax(-1)
    assert set(found.logprobs) == {1, 2}
    one, two = found.logprobs[1], found.logprobs[2]
    assert one.token == 9 and math.isclose(one.logprob, table[1, 9], rel_tol=1e-5)
    best = table[1].topk(2)
    assert [token for token, _ in one.top] == best.indices.tolist()
    assert [value for _, value in one.top] == pytest.approx(best.values.tolist())
    assert two.top == () and math.isclose(two.logprob, table[2].max(), rel_tol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_give_no_token_and_harm_no_other_row(broken):
    logits = scores(3)
    best = logits.argmax(-1).tolist()
    logits[1, 4] = broken
    chooser = sampler()
    rows = [chooser.enter(0, asked()), chooser.enter(1, asked(temperature=1.0, seed=1, frequency_penalty=1.0)),
            chooser.enter(2, asked())]  # fmt: skip
    assert chooser.choose(logits, rows).tokens == [best[0], -1, best[2]]


def test_a_temperature_near_zero_is_greedy():
    logits = scores(1, seed=3)
    chooser = sampler()
    seat = chooser.enter(0, asked(temperature=1e-60, seed=1))
    assert chooser.choose(logits, [seat]).tokens == logits.argmax(-1).tolist()
