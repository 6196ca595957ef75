"""Golden prompts: a few prompts with what the model said to them, so that any copy or export can be asked again.

A golden holds token ids, the greedy continuation, and the largest logits at every step with a tolerance. Replaying
says at which level a difference begins: ids (tokenizer), logits (weights), output, stop (end of text).
Does not know files. Decoding is a plain loop over whole forwards: no cache, no generation config, nothing to differ in.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1
_RANDOM_PROMPTS = 3
_RANDOM_LENGTH = 12
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Difference:
    """One prompt whose replay is not what was recorded, at the first level where it differs."""

    prompt: int
    level: str  # "ids", "logits", "output" or "stop"
    detail: str

    def __str__(self) -> str:
        return f"prompt {self.prompt + 1}: {self.level} differ: {self.detail}"


@dataclass(frozen=True)
class _Spoken:
    output: list[int]
    stopped: bool
    top: list[list[tuple[int, float]]]  # for every step, (id, logit), largest first


def random_prompts(vocabulary: int, *, count: int = _RANDOM_PROMPTS, seed: int = 0) -> list[list[int]]:
    """`count` prompts of seeded random token ids, for models without a tokenizer."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (count, _RANDOM_LENGTH), generator=draw).tolist()


def make_golden(
    model: nn.Module,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    texts: Sequence[str] | None = None,
    stop_ids: Sequence[int] = (),
    max_new_tokens: int = 16,
    top: int = 8,
) -> dict[str, Any]:
    """Ask a model some prompts (token ids; seeded random ids where None) and record what it says, as JSON values.

    `texts` are what the ids were made from, with which `replay` checks a tokenizer. Classifiers are asked for their
    logits alone. The tolerance covers another batch size, kernel or machine in the model's own dtype.
    """
    if prompts is None:
        config: Any = model.config
        prompts = random_prompts(int(config.get_text_config().vocab_size))
    steps = max_new_tokens if _speaks(model) else 0
    records: list[dict[str, Any]] = []
    for i, ids in enumerate(prompts):
        spoken = _speak(model, list(ids), steps, set(stop_ids), top)
        record = {"ids": list(ids), "output": spoken.output, "stopped": spoken.stopped, "top": spoken.top}
        records.append(record if texts is None else {**record, "text": texts[i]})
    largest = max((abs(v) for r in records for step in r["top"] for _, v in step), default=1.0)
    return {
        "format": FORMAT,
        "dtype": _DTYPES.get(_dtype(model)),
        "stop_ids": list(stop_ids),
        "max_new_tokens": steps,
        "tolerance": tolerance_of(model, largest),
        "prompts": records,
    }


def replay(model: nn.Module, golden: Mapping[str, Any], *, tokenizer: Any = None) -> list[Difference]:
    """Ask the recorded prompts again; [] if the model says the same.

    With a tokenizer, prompts that have a text are encoded anew (without special tokens) and compared first. Where two
    candidates were closer than the tolerance, either continuation is accepted and the comparison of that prompt ends.
    The tolerance is the wider of the recorded one and that of this model's dtype; it is what one logit may be off, and
    `mean_allowed` what a prompt's logits may be off on average.
    """
    largest = max((abs(v) for r in golden["prompts"] for step in r["top"] for _, v in step), default=1.0)
    tolerance = max(golden["tolerance"], tolerance_of(model, largest))
    found = []
    for i, record in enumerate(golden["prompts"]):
        difference = _ids(record, tokenizer) or _replay_one(model, {**golden, "tolerance": tolerance}, record)
        if difference is not None:
            found.append(Difference(i, *difference))
    return found


@torch.no_grad()
def replay_forced(model: nn.Module, golden: Mapping[str, Any]) -> list[Difference]:
    """The logits of a decoder along each recorded continuation, in one forward a prompt; [] if they are the recorded.

    Says what `replay` says of logits in a sixteenth of the time, and cannot say where the continuation would leave the
    recorded one: a server that admits adapters while it works has no time for more.
    """
    found = []
    for i, record in enumerate(golden["prompts"]):
        ids, output = record["ids"], record["output"]
        device = next(model.parameters()).device
        logits = model(input_ids=torch.tensor([[*ids, *output]], device=device)).logits[0, len(ids) - 1 :]  # (T, V)
        largest = max((abs(v) for step in record["top"] for _, v in step), default=1.0)
        fault = _forced_gap(logits.float(), record["top"], max(golden["tolerance"], tolerance_of(model, largest)))
        found += [Difference(i, "logits", fault)] if fault else []
    return found


def _forced_gap(logits: Tensor, top: Sequence[Any], tolerance: float) -> str | None:
    """What is wrong with the logits (T, V) of one prompt's steps."""
    offs: list[float] = []
    for step, (then, now) in enumerate(zip(top, logits, strict=False)):
        seen = now[[int(token) for token, _ in then]].tolist()
        for (token, was), value in zip(then, seen, strict=True):
            if not abs(value - was) <= tolerance:  # NaN too
                return f"step {step}, logit of token {token} is {value:.4g}, was {was:.4g} (tolerance {tolerance:.3g})"
            offs.append(abs(value - was))
        most = float(now.max())
        if most > then[0][1] + tolerance:
            return f"step {step}, the largest logit is {most:.4g}, was {then[0][1]:.4g} (tolerance {tolerance:.3g})"
    return mean_fault(offs, tolerance)


def mean_allowed(tolerance: float) -> float:
    """How far a prompt's logits may be off on average, where one may be off by `tolerance`: half of one rounding.

    Roundings scatter and a changed weight pushes: in 16 bits one logit has the room that most adapters need to change
    it, and the mean has not.
    """
    return max(tolerance / 16, 5e-5)


def mean_fault(offs: Sequence[float], tolerance: float) -> str | None:
    """What is wrong with how far the logits of one prompt are off, taken together."""
    mean = sum(offs) / max(len(offs), 1)
    if mean <= mean_allowed(tolerance):
        return None
    return f"{len(offs)} logits are {mean:.3g} off on average (at most {mean_allowed(tolerance):.3g} are allowed)"


def _ids(record: Mapping[str, Any], tokenizer: Any) -> tuple[str, str] | None:
    if tokenizer is None or "text" not in record:
        return None
    ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
    if ids == record["ids"]:
        return None
    was = record["ids"]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, was, strict=False))
    return "ids", f"the tokenizer gives {len(ids)} tokens, recorded are {len(was)}, first other at {len(list(same))}"


def _replay_one(model: nn.Module, golden: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, str] | None:
    tolerance = golden["tolerance"]
    spoken = _speak(model, record["ids"], golden["max_new_tokens"], set(golden["stop_ids"]), len(record["top"][0]))
    offs: list[float] = []
    for step, (then, now) in enumerate(zip(record["top"], spoken.top, strict=False)):
        gap = _gap(then, now, tolerance)
        if gap is not None:
            return "logits", f"step {step}, {gap} (tolerance {tolerance:.3g})"
        offs += _offs(then, now)
        if step < len(record["output"]) and spoken.output[step : step + 1] != record["output"][step : step + 1]:
            if then[0][1] - then[1][1] <= 2 * tolerance:
                break  # a tie within the tolerance: what follows cannot be compared
            return "output", f"step {step} is token {spoken.output[step : step + 1]}, was {record['output'][step]}"
    else:
        if spoken.stopped != record["stopped"]:
            ending, before = _ended(spoken.stopped), _ended(record["stopped"])
            return "stop", f"it {ending} after {len(spoken.output)} tokens, when recorded it {before}"
    fault = mean_fault(offs, tolerance)
    return ("logits", fault) if fault else None


def _offs(then: list[Any], now: list[Any]) -> list[float]:
    """By how much each recorded candidate that is still in the list is off."""
    found = {int(token): value for token, value in now}
    return [abs(value - found[int(token)]) for token, value in then if int(token) in found]


def _ended(stopped: bool) -> str:
    return "stopped" if stopped else "went on"


def _gap(then: list[Any], now: list[Any], tolerance: float) -> str | None:
    """What is wrong with the logits of one step, comparing the recorded candidates by their ids."""
    found = {int(i): v for i, v in now}
    floor = min(found.values())
    for token, value in then:
        seen = found.get(int(token))
        # a candidate that fell out of the list has a logit of at most the list's last
        off = abs(value - seen) if seen is not None else value - floor
        if off > tolerance:
            was = f"{seen:.4g}" if seen is not None else f"at most {floor:.4g}"
            return f"logit of token {int(token)} is {was}, was {value:.4g}"
    return None


def _speaks(model: nn.Module) -> bool:
    """Whether the model makes text: its logits are over its vocabulary."""
    return callable(getattr(model, "can_generate", None)) and bool(model.can_generate())  # type: ignore[operator]


@torch.no_grad()
def _speak(model: nn.Module, ids: list[int], steps: int, stop_ids: set[int], top: int) -> _Spoken:
    output: list[int] = []
    tops: list[list[tuple[int, float]]] = []
    for step in range(max(steps, 1)):
        logits = _last_logits(model, ids, output)  # (V,)
        values, indices = logits.float().topk(min(top, logits.numel()))
        tops.append(list(zip(indices.tolist(), values.tolist(), strict=True)))
        if step >= steps:
            break
        output.append(tops[-1][0][0])
        if output[-1] in stop_ids:
            return _Spoken(output, True, tops)
    return _Spoken(output, False, tops)


def _last_logits(model: Any, ids: list[int], output: list[int]) -> Tensor:
    device = next(model.parameters()).device
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        start = config.decoder_start_token_id  # type: ignore[union-attr]
        decoder = torch.tensor([[start, *output]], device=device)
        logits = model(input_ids=torch.tensor([ids], device=device), decoder_input_ids=decoder).logits
    else:
        logits = model(input_ids=torch.tensor([[*ids, *output]], device=device)).logits
    return logits.reshape(-1, logits.shape[-1])[-1]  # (V,), or (labels,) of a classifier or of the last token


def tolerance_of(model: nn.Module, largest: float) -> float:
    """Eight roundings of the largest logit in the model's coarsest dtype, and never less than 1e-4.

    Packed weights multiply in a dtype of their own, whatever the rest is held in.
    """
    dtypes: list[Any] = [m.compute_dtype for m in model.modules() if hasattr(m, "packed_shapes")]
    dtypes.append(_dtype(model))
    return max(1e-4, 8 * max(torch.finfo(dtype).eps for dtype in set(dtypes)) * largest)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model's weights are held in, packed ones aside."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
