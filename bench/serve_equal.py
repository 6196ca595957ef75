"""What the engine answers against `generate` alone, request by request: 500 random requests in one moving batch.

The model that ships, with eight adapters of mixed ranks, targets and kinds (two of them trained for some steps, with a
token's row; one DoRA) and the base; prompts of 1 to 90 tokens, half of them questions that the adapters know, half
random ids; answers of 1 to 40 tokens, greedy, two in three with stop tokens; every sixth request is cancelled on the
way. 24 clients share 12 rows and 8 adapters 5 slots, so rows join, leave and move, and adapters are evicted, all the
time. Each request is then put alone to transformers' `generate` on the plain model with that one adapter active. An
answer counts as equal where every id is (a cancelled one: every id that came) and where it ended for the reason that
`generate` had.

In bf16 a batch rounds otherwise than a single row does. Where two answers part there, the plain model's own scores of
the two tokens are compared at that place: a near-tie is a gap of at most two steps of bf16 at the size of the score.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.claim import line
from bench.engine_clients import Answer, ask_all
from bench.served import (
    config,
    open_model,
    questions,
    random_prompts,
    shipped,
    store_of,
    train_adapters,
    write_adapters,
)  # fmt: skip

REQUESTS, CLIENTS, ROWS = 500, 24, 12
TRAINED, STEPS = 2, 24
LONGEST_PROMPT, MOST_TOKENS = 90, 40
BF16_STEP = 2.0**-7
"""Distance of neighbouring bf16 numbers, relative to the power of two below them."""


@dataclass(frozen=True)
class Difference:
    """Where an answer first parts from `generate`'s, and how far apart the plain model scores the two tokens."""

    request: int
    place: int
    gap: float
    score: float
    """The larger of the two scores."""

    @property
    def near_tie(self) -> bool:
        return self.gap <= 2 * BF16_STEP * max(1.0, abs(self.score))


def run(rounds: int | None = None, requests: int = REQUESTS) -> list[dict[str, Any]]:
    """How many of the answers are equal, in float32 and in bf16."""
    del rounds  # nothing is timed
    with tempfile.TemporaryDirectory(prefix="lofi-bench-") as name:
        folders = adapters(Path(name))
        rows = []
        for dtype in ("float32", "bfloat16"):
            with both(folders, dtype) as (engine, plain):
                asked = draw(list(folders), requests)
                answers = ask_all(engine, asked[0], clients=CLIENTS, cancel_after=asked[1])
                rows.append(_line(dtype, *compare(plain, asked[0], answers)))
    return rows


def _line(dtype: str, count: int, differences: Sequence[Difference], faults: Sequence[str]) -> dict[str, Any]:
    wrong = {found.request for found in differences}
    ties = [found for found in differences if found.near_tie]
    told = [f"{len(ties)} of the {len(differences)} that differ part at a near-tie"] if differences else []
    if differences:
        widest = max(differences, key=lambda found: found.gap)
        told.append(f"the widest gap is {widest.gap:.3g} at a score of {widest.score:.3g}")
    what = f"{dtype}: answers equal to generate alone, of {count}"
    goal = f">= {count}" if dtype == "float32" else None
    return line(what, count - len(wrong) - len(faults), goal=goal, detail="; ".join([*told, *faults[:3]]))


def adapters(folder: Path, trained: int = TRAINED, steps: int = STEPS) -> dict[str, Path]:
    """Trained and random adapters of the shipped model."""
    made = train_adapters(folder / "trained", count=trained, steps=steps)
    model, _ = open_model(shipped())
    return made | write_adapters(model, folder / "random", {f"random-{n}": config(n, mixed=True) for n in range(6)})


@contextmanager
def both(folders: Mapping[str, Path], dtype: str) -> Iterator[tuple[Any, Any]]:
    """(a running engine, the plain model with the same adapters, none active) in one dtype."""
    from lofi.adapters.switch import set_adapter
    from lofi.files.adapter_folder import load_adapter
    from lofi.serve.engine import Engine

    plain, _ = open_model(shipped(), dtype)
    for name, folder in folders.items():
        load_adapter(plain, folder, name)
    set_adapter(plain, None)
    opened = open_model(shipped(), dtype)
    engine = Engine(*opened, store_of(*opened, folders, slots=5), rows=ROWS)
    engine.start()
    try:
        yield engine, plain.eval()
    finally:
        engine.stop()


def draw(names: Sequence[str], count: int, *, seed: int = 0) -> tuple[list[Any], dict[int, int]]:
    """(requests, {request that is cancelled: after how many tokens}).

    Fewer slots than adapters: they are evicted and placed again on the way.
    """
    from lofi.serve.request import Asked

    rng = random.Random(seed)
    known = questions(count // 2 + 1)
    unknown = random_prompts(count, LONGEST_PROMPT, 8192, seed=seed)
    requests, cancelled = [], {}
    for number in range(count):
        prompt = known[number // 2] if number % 2 else unknown[number][: rng.randint(1, LONGEST_PROMPT)]
        most = rng.randint(1, MOST_TOKENS)
        stops = rng.choice([(), (1,), (1, 3)])
        requests.append(Asked(prompt=prompt, adapter=rng.choice([None, *names]), max_tokens=most, stop_ids=stops))
        if number % 6 == 5:
            cancelled[number] = rng.randint(1, most)
    return requests, cancelled


def compare(plain: Any, requests: Sequence[Any], answers: Sequence[Answer]) -> tuple[int, list[Difference], list[str]]:
    """(answers compared, where ids differ, sentences about answers that ended otherwise than `generate`)."""
    differences, faults = [], []
    for number, (asked, answer) in enumerate(zip(requests, answers, strict=True)):
        expected = alone(plain, asked)
        place = first_difference(answer, expected)
        if place is not None:
            differences.append(_difference(plain, number, asked, expected, answer, place))
        elif answer.finish not in ("cancelled", end_of(asked, expected)):
            faults.append(f"request {number} ended with {answer.finish}, not {end_of(asked, expected)}")
    return len(requests), differences, faults


def first_difference(answer: Answer, expected: Sequence[int]) -> int | None:
    """The first place where the ids differ or one side has none; what a cancelled answer lacks at its end is none."""
    for place, (one, other) in enumerate(zip(answer.tokens, expected, strict=False)):
        if one != other:
            return place
    if len(answer.tokens) == len(expected) or (answer.finish == "cancelled" and len(answer.tokens) < len(expected)):
        return None
    return min(len(answer.tokens), len(expected))


def end_of(asked: Any, expected: Sequence[int]) -> str:
    return "stop" if expected and expected[-1] in asked.stop_ids else "length"


def alone(plain: Any, asked: Any) -> list[int]:
    """The new ids of transformers' greedy `generate` for this request alone, its adapter active."""
    from transformers import GenerationConfig

    ids = torch.tensor([asked.prompt])  # (1, T)
    never = [plain.config.vocab_size]  # None would stand for the model's own
    chosen = GenerationConfig(
        do_sample=False, max_new_tokens=asked.max_tokens, pad_token_id=0, eos_token_id=list(asked.stop_ids) or never
    )
    with speaker(plain, asked.adapter), torch.inference_mode():
        made = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=chosen)
    return made[0, len(asked.prompt) :].tolist()


@contextmanager
def speaker(plain: Any, name: str | None) -> Iterator[None]:
    from lofi.adapters.switch import adapters_off, using

    with using(plain, name) if name else adapters_off(plain):
        yield


def _difference(plain: Any, number: int, asked: Any, expected: Sequence[int], answer: Answer, place: int) -> Difference:
    """What the plain model, without a cache, scores the two tokens at the place where they part."""
    if place >= len(expected) or place >= len(answer.tokens):
        return Difference(number, place, float("inf"), 0.0)
    ids = torch.tensor([[*asked.prompt, *expected[:place]]])  # (1, T)
    with speaker(plain, asked.adapter), torch.inference_mode():
        scores = plain(ids, use_cache=False).logits[0, -1].float()  # (V,)
    pair = scores[[expected[place], answer.tokens[place]]]
    return Difference(number, place, float((pair[0] - pair[1]).abs()), float(pair.max()))
