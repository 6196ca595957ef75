"""Which tokens come next: all rows of a step at once, each drawn from its own stream.

Knows logits and what each row asked for (`Drawing`). Rows that ask for nothing cost one argmax together. A drawn row
takes one number u in [0, 1) a token from a generator seeded by its request, and the token where the cumulated
probabilities, in the order of token ids, pass u: what a row draws depends on its own scores, not on its neighbours.
Rejected: torch.multinomial (one stream for all rows); a Gumbel noise for every score, as evaluation draws (a call and
a vocabulary of random numbers a row and token).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lofi.serve.request import Asked, Drawing, TokenLogprob

_LIKELY = 256  # tokens that usually hold the mass of top_p; found without sorting the vocabulary
_BELOW_ONE = 1 - 2**-40  # keeps u times the total below the total after rounding
_COLD = 1e-6  # temperatures below choose as this one does, and would divide by zero
_GONE = float("-inf")


@dataclass(frozen=True, eq=False)
class Seat:
    """One row's wishes and its own random stream."""

    number: int
    """Where its counts are kept, the same from its first to its last token."""
    asked: Asked
    stream: random.Random


class Chosen(NamedTuple):
    """The next tokens of n rows; -1 where a row's scores are not numbers."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprob]
    """By row, of those that asked."""


class Sampler:
    """Chooses tokens for up to `seats` rows; what rows ask for is turned into tensors once, not once a step."""

    def __init__(self, *, seats: int, vocabulary: int, device: Any) -> None:
        self.vocabulary = vocabulary
        self.device = device
        self.counts = _Counts(seats, vocabulary, device)
        self._rows: Sequence[Seat] = ()
        self._plan = _Plan((), device)

    def enter(self, number: int, asked: Asked) -> Seat:
        """A row begins: its stream from its seed, its counts from its prompt."""
        if _counted(asked.drawing):
            self.counts.begin(number, asked.prompt)
        return Seat(number, asked, random.Random(asked.drawing.seed))

    def choose(self, logits: Tensor, rows: Sequence[Seat]) -> Chosen:
        """The next token of each row from logits (n, V)."""
        if rows != self._rows:  # seats are equal to themselves alone
            self._rows, self._plan = list(rows), _Plan(rows, self.device)
        plan = self._plan
        best = logits.argmax(-1)  # (n,); the place of the first nan where there is one
        sound = logits.gather(1, best[:, None])[:, 0].isfinite()
        picked = self._altered(logits, best, plan) if plan.altered else best
        tokens = torch.where(sound, picked, -1)
        if plan.counted:
            self.counts.add(plan.counted_seats, tokens[plan.counted_rows])
        return Chosen(tokens.tolist(), _logprobs(logits, picked, plan) if plan.logged else {})

    def _altered(self, logits: Tensor, best: Tensor, plan: _Plan) -> Tensor:
        """`best` with the rows that want another token than the likeliest."""
        scores = logits[plan.altered_rows].float()  # (a, V)
        for change in plan.changes(self.counts):
            scores = change(scores)
        taken = scores.argmax(-1)
        if plan.drawn:
            taken[plan.drawn_rows] = _drawn(scores[plan.drawn_rows], plan)
        return best.index_put((plan.altered_rows,), taken)


class _Counts:
    """How often each seat's answer holds each token, and which tokens its prompt or answer holds; made when needed."""

    def __init__(self, seats: int, vocabulary: int, device: Any) -> None:
        self.shape, self.device = (seats, vocabulary), device
        self.answered: Tensor | None = None  # (seats, V) float32
        self.seen: Tensor | None = None  # (seats, V) bool

    def begin(self, seat: int, prompt: Sequence[int]) -> None:
        if self.answered is None or self.seen is None:
            with torch.inference_mode(False):
                self.answered = torch.zeros(self.shape, device=self.device)
                self.seen = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        self.answered[seat] = 0
        self.seen[seat] = False
        self.seen[seat, list(prompt)] = True

    def add(self, seats: Tensor, tokens: Tensor) -> None:
        assert self.answered is not None and self.seen is not None
        tokens = tokens.clamp_min(0)  # rows without a token end in this step
        self.answered.index_put_((seats, tokens), torch.ones(len(seats), device=self.device), accumulate=True)
        self.seen.index_put_((seats, tokens), torch.ones_like(seats, dtype=torch.bool))


class _Plan:
    """What a batch of rows asks for, as tensors; `changes` alter the scores of the rows that are not simply greedy."""

    def __init__(self, rows: Sequence[Seat], device: Any) -> None:
        self.device = device
        drawings = [row.asked.drawing for row in rows]
        self.altered = [i for i, one in enumerate(drawings) if one.temperature > 0 or _counted(one) or one.logit_bias]
        self.counted = [i for i, one in enumerate(drawings) if _counted(one)]
        self.logged = [i for i, row in enumerate(rows) if row.asked.logprobs is not None]
        self.likeliest = [rows[i].asked.logprobs or 0 for i in self.logged]
        own = [rows[i] for i in self.altered]
        self.wishes = [row.asked.drawing for row in own]
        self.drawn = [i for i, one in enumerate(self.wishes) if one.temperature > 0]
        self.streams = [own[i].stream for i in self.drawn]
        self._seats = [row.number for row in rows]
        if self.altered:
            self._tensors()

    def _tensors(self) -> None:
        self.altered_rows, self.drawn_rows = self._ids(self.altered), self._ids(self.drawn)
        self.counted_rows = self._ids(self.counted)
        self.counted_seats = self._ids([self._seats[i] for i in self.counted])
        drawn = [self.wishes[i] for i in self.drawn]
        self.temperature = self._column([max(one.temperature, _COLD) for one in drawn])
        self.top_p = self._column([one.top_p for one in drawn])
        self.top_k = self._ids([one.top_k for one in drawn])[:, None]
        self.any_top_k, self.any_top_p = any(one.top_k for one in drawn), any(one.top_p < 1 for one in drawn)
        biased = [(i, token, value) for i, one in enumerate(self.wishes) for token, value in one.logit_bias]
        self.bias_at = self._ids([row for row, _, _ in biased]), self._ids([token for _, token, _ in biased])
        self.bias = torch.tensor([value for _, _, value in biased], device=self.device)
        among = [i for i, one in enumerate(self.wishes) if _counted(one)]
        self.penal_rows, penal = self._ids(among), [self.wishes[i] for i in among]
        self.repetition = self._column([one.repetition_penalty for one in penal])
        self.presence = self._column([one.presence_penalty for one in penal])
        self.frequency = self._column([one.frequency_penalty for one in penal])

    def changes(self, counts: _Counts) -> list[Callable[[Tensor], Tensor]]:
        """What is done to the scores (a, V), in order."""
        found: list[Callable[[Tensor], Tensor]] = []
        if len(self.bias):
            found.append(lambda scores: scores.index_put(self.bias_at, self.bias, accumulate=True))
        if self.counted:
            found.append(lambda scores: self._penalised(scores, counts))
        return found

    def _penalised(self, scores: Tensor, counts: _Counts) -> Tensor:
        assert counts.answered is not None and counts.seen is not None
        own, answered = scores[self.penal_rows], counts.answered[self.counted_seats]
        repeated = torch.where(own > 0, own / self.repetition, own * self.repetition)
        own = torch.where(counts.seen[self.counted_seats], repeated, own)
        own = own - self.frequency * answered - self.presence * (answered > 0)
        return scores.index_put((self.penal_rows,), own)

    def _ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]


def _counted(drawing: Drawing) -> bool:
    return bool(drawing.presence_penalty or drawing.frequency_penalty or drawing.repetition_penalty != 1)


def _drawn(scores: Tensor, plan: _Plan) -> Tensor:
    """One draw a row from softmax(scores / temperature), cut by top_k, then by top_p; scores (d, V)."""
    scores = (scores - scores.amax(-1, keepdim=True)) / plan.temperature
    if plan.any_top_k:
        scores = _cut_top_k(scores, plan.top_k)
    if plan.any_top_p:
        scores = _cut_top_p(scores, plan.top_p)
    cumulated = scores.softmax(-1).double().cumsum(-1)  # (d, V)
    numbers = [[stream.random() * _BELOW_ONE] for stream in plan.streams]
    passed = torch.tensor(numbers, dtype=torch.float64, device=scores.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, passed, right=True)[:, 0].clamp_max(scores.shape[-1] - 1)


def _cut_top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    """Every token below the k likeliest gone; ties with the last of them stay, 0 keeps all."""
    most = min(int(top_k.max()), scores.shape[-1])
    least = scores.topk(most).values.gather(1, (top_k.clamp(1, most) - 1))
    return scores.masked_fill((scores < least) & (top_k > 0), _GONE)


def _cut_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Every token below the fewest likeliest ones whose mass reaches top_p gone; ties with the last of them stay."""
    total = scores.logsumexp(-1, keepdim=True)
    size = scores.shape[-1]
    for width in (min(_LIKELY, size), size):
        ordered = scores.topk(width).values if width < size else scores.sort(descending=True).values
        mass = (ordered - total).exp()
        kept = (mass.cumsum(-1) - mass < top_p).sum(-1, keepdim=True)  # (d, 1): tokens before which mass is missing
        if width == size or not bool(((kept == width) & (top_p < 1)).any()):
            break
    least = ordered.gather(1, kept.clamp_min(1) - 1)
    return scores.masked_fill((scores < least) & (top_p < 1), _GONE)


def _logprobs(logits: Tensor, picked: Tensor, plan: _Plan) -> dict[int, TokenLogprob]:
    """Log probabilities under the distribution before penalties and temperature."""
    logged = torch.tensor(plan.logged, device=logits.device)
    table = logits[logged].float().log_softmax(-1)  # (l, V)
    own = table.gather(1, picked[logged][:, None])
    best = table.topk(min(max(plan.likeliest), table.shape[-1]))
    rows = zip(plan.logged, plan.likeliest, picked[logged].tolist(), own[:, 0].tolist(), strict=True)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {
        row: TokenLogprob(token=token, logprob=value, top=tuple(zip(ids[:count], values[:count], strict=True)))
        for (row, count, token, value), (ids, values) in zip(rows, tops, strict=True)
    }
