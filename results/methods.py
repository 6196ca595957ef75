"""Every method on stories260k and E2E NLG, three seeds: examples/studies/methods-e2e.yaml as it stands.

Budget  24 single-thread minutes: 51 runs, each about 20 s of training (250 steps of 512 tokens) and 6 s of judging.
The rows are cut to what they need: 250 steps see about 900 rows, and every sixth of the 630 test inputs is asked.
The rates come from results/studies/rates-e2e.yaml.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results.lab import Lab, Section, figure, shown

STUDY = "examples/studies/methods-e2e.yaml"
TRAIN_ROWS, EVERY = 2000, 6
FULL = "full"
WITHIN = 0.05
EARLY = 0.1
"""The share of the steps after which the initialisations are compared."""
RIVALS = ("OLoRA r=8", "PiSSA r=8")
PLAIN = "LoRA r=8"


def run(lab: Lab) -> Section:
    train = first_rows(lab, "e2e_nlg", "train", count=TRAIN_ROWS)
    test = first_rows(lab, "e2e_nlg", "test", every=EVERY)
    words = (f"model={lab.model('stories260k')}", f"data.train={train}", f"data.test={test}")
    answer, records = lab.compare(STUDY, *words, output="methods")
    arms = list(dict.fromkeys(record["arm"] for record in records))
    return Section(
        "The methods on stories260k and E2E NLG",
        f"Meaning representation to sentence, 250 steps of 512 tokens of the first {TRAIN_ROWS:,} training rows; every "
        f"{EVERY}th input of the official test set, all human references, greedy decoding. Each method has the best "
        "learning rate of a short sweep. Mean over three seeds with its 95 % interval over seeds and examples.",
        ["arm", "trained", "BLEU", "ROUGE-L", "loss", f"train loss after {EARLY:.0%}", "peak MB", "trained tokens/s"],
        [_row(answer, records, arm) for arm in arms],
        notes=[*_goal(answer, records), *(_early(records, rival) for rival in RIVALS), f"verdict: {answer['verdict']}"],
    )


def first_rows(lab: Lab, data: str, split: str, *, count: int | None = None, every: int = 1) -> Path:
    """A file of the first rows of a shared one, or of every so manyth, in the work folder."""
    lines = lab.data(data, split).read_text(encoding="utf-8").splitlines(keepends=True)[::every][:count]
    cut = lab.work / "data" / f"{data}-{split}-{len(lines)}.jsonl"
    cut.parent.mkdir(parents=True, exist_ok=True)
    cut.write_text("".join(lines), encoding="utf-8")
    return cut


def _row(answer: dict[str, Any], records: Sequence[dict[str, Any]], arm: str) -> list[str]:
    early = early_losses(records, arm)
    return [
        arm,
        share(records, arm),
        shown(figure(answer, "bleu", arm), 1),
        shown(figure(answer, "rougeL", arm)),
        shown(figure(answer, "loss", arm)),
        f"{statistics.mean(early):.3f}" if early else "",
        mean_of(records, arm, "peak_mb", "{:,.0f}"),
        mean_of(records, arm, "tokens_per_second", "{:,.0f}"),
    ]


def share(records: Sequence[dict[str, Any]], arm: str) -> str:
    """How many parameters an arm trains, of all."""
    figures = next(record["figures"] for record in records if record["arm"] == arm)
    if not figures.get("trainable"):
        return ""
    return f"{figures['trainable']:,.0f} ({100 * figures['trainable'] / figures['total']:.1f} %)"


def mean_of(records: Sequence[dict[str, Any]], arm: str, key: str, form: str) -> str:
    """The mean of one figure over an arm's runs."""
    values = [record["figures"].get(key) for record in records if record["arm"] == arm]
    known = [value for value in values if value is not None]
    return form.format(statistics.mean(known)) if known else ""


def early_losses(records: Sequence[dict[str, Any]], arm: str) -> list[float]:
    """Each seed's training loss after the first EARLY of the steps: of rows not seen before, the same for all arms."""
    curves = [record["curve"] for record in records if record["arm"] == arm and record.get("curve")]
    return [loss_at(curve, EARLY * curve[-1][0]) for curve in curves]


def loss_at(curve: Sequence[Sequence[float]], step: float) -> float:
    """The mean training loss of the steps up to the first logged one that is at least `step`."""
    return next(loss for at, loss in curve if at >= step)


def _goal(answer: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
    """LoRA at 10 to 20 % of the parameters against full fine-tuning."""
    full = figure(answer, "bleu", FULL)["value"]
    told = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        figures = next(record["figures"] for record in records if record["arm"] == arm)
        part = (figures.get("trainable") or 0) / (figures.get("total") or 1)
        if arm.startswith("LoRA r=") and 0.1 <= part <= 0.2:
            off = figure(answer, "bleu", arm)["value"] / full - 1
            met = "reached" if off >= -WITHIN else "**not reached**"
            told.append(f"{arm} trains {part:.1%} and its BLEU is {off:+.1%} of full's; within {WITHIN:.0%}: {met}")
    return told


def _early(records: Sequence[dict[str, Any]], rival: str) -> str:
    """Whether an initialisation is ahead of Kaiming's early on, seed by seed."""
    ours, theirs = early_losses(records, rival), early_losses(records, PLAIN)
    gaps = [mine - other for mine, other in zip(ours, theirs, strict=False)]
    if not gaps:
        return f"{rival} has no finished run"
    word = "ahead of" if max(gaps) < 0 else "behind" if min(gaps) > 0 else "neither ahead of nor behind"
    seeds = ", ".join(f"{gap:+.3f}" for gap in gaps)
    return f"after {EARLY:.0%} of the steps {rival} is {word} {PLAIN} (Kaiming): training loss {seeds} seed by seed"
