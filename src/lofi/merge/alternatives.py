"""The forms that a merge could take, each made in memory and measured with the same probes, and which one to take.

Nothing is written here. Knows forms and verdicts; what a form costs is the bytes of its weights.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lofi.adapters.merge import merge_in_memory
from lofi.evaluate.intervals import Interval
from lofi.merge.calibration import Calibration
from lofi.merge.form import Form
from lofi.merge.packed import Packed, pack_merged, unpack, weight_bytes
from lofi.merge.probes import Probes
from lofi.merge.shards import changes
from lofi.merge.source import NAME, Source
from lofi.merge.verdict import Measured, Verdict, judge, measure

ENOUGH = 0.99
"""The share of the gain that the recommended form keeps, where none was asked for."""


@dataclass(frozen=True)
class Alternative:
    """One form, how good it is, and what it weighs."""

    form: Form
    verdict: Verdict
    weight_bytes: int

    def line(self) -> str:
        """The form's figures in words."""
        share = self.verdict.share_kept
        kept = "" if share is None else f"keeps {share.value:.1%} of the gain, "
        return (
            f"{self.form}: {kept}KL {self.verdict.kl:.3g}, next token {self.verdict.top1_agreement:.1%} the same, "
            f"{self.weight_bytes / 1e6:,.1f} MB"
        )

    def rows(self) -> list[dict[str, Any]]:
        """The figures as `--json` rows."""
        share = self.verdict.share_kept or Interval(None, None, None)  # type: ignore[arg-type]
        figures = {
            "share_kept": (share, self.verdict.examples),
            "kl": (Interval(self.verdict.kl, None, None), self.verdict.positions),
            "top1_agreement": (Interval(self.verdict.top1_agreement, None, None), self.verdict.positions),
            "weight_bytes": (Interval(self.weight_bytes, None, None), 1),
        }
        return [
            {
                "who": str(self.form),
                "metric": metric,
                "value": figure.value,
                "low": figure.low,
                "high": figure.high,
                "n": n,
            }
            for metric, (figure, n) in figures.items()
        ]


@dataclass(frozen=True)
class Trials:
    """What every form is made from and measured against."""

    source: Source
    probes: Probes
    calibration: Calibration | None
    alone: Measured
    adapted: Measured

    def make(self, form: Form) -> Packed:
        """The merged model in memory; `form` names one rounding."""
        model = self.source.open(form.onto)
        if form.into != "dense":
            return pack_merged(model, NAME, form.into, form.rounding, self.calibration if form.calibrates else None)
        changed = len(changes(model, NAME))
        return Packed(unpack(merge_in_memory(model, NAME, inplace=True)), changed)

    def tried(self, form: Form) -> tuple[Alternative, Packed]:
        """The form made and measured: its figures, and the model."""
        made = self.make(form)
        return Alternative(form, self.judged(measure(made.model, self.probes)), weight_bytes(made.model)), made

    def measured(self, form: Form) -> Alternative:
        """The form made, measured and forgotten."""
        found = self.tried(form)[0]
        gc.collect()  # modules are cycles
        return found

    def judged(self, merged: Measured) -> Verdict:
        """The verdict on what a merged model said."""
        return judge(self.alone, self.adapted, merged, self.probes)


def forms_to_compare(form: Form, source: Source) -> list[Form]:
    """Every form that could be had from this source, dense first."""
    onto = ["original", "dequantized"] if source.has_both and form.onto == "auto" else [form.onto]
    packed = [Form(into, rounding, form.onto) for into in ("int8", "nf4") for rounding in ("nearest", "compensated")]
    return [*(Form("dense", "auto", one) for one in onto), *packed]


def better(one: Alternative, other: Alternative) -> Alternative:
    """The one that keeps more of the gain; that is nearer to base + adapter where no gain can be told."""
    shares = one.verdict.share_kept, other.verdict.share_kept
    if shares[0] is not None and shares[1] is not None:
        return one if shares[0].value >= shares[1].value else other
    return one if one.verdict.kl <= other.verdict.kl else other


def keeps_more(alternatives: Sequence[Alternative]) -> str | None:
    """One sentence on the two dense merges, onto the original and onto the dequantized weights; None without both."""
    shares = {
        a.form.onto: a.verdict.share_kept.value
        for a in alternatives
        if a.form.into == "dense" and a.form.onto != "auto" and a.verdict.share_kept is not None
    }
    if len(shares) < 2:
        return None
    more, less = sorted(shares, key=lambda onto: -shares[onto])
    return f"dense onto the {more} weights keeps {shares[more]:.1%} of the gain, onto the {less} {shares[less]:.1%}"


def recommend(alternatives: Sequence[Alternative], min_kept: float | None = None) -> str | None:
    """One sentence: the lightest form that keeps enough of the gain, or that which keeps most; None without shares."""
    told = [(a, a.verdict.share_kept.value) for a in alternatives if a.verdict.share_kept is not None]
    if len(told) < 2:
        return None
    wanted = ENOUGH if min_kept is None else min_kept
    enough = [(a, share) for a, share in told if share >= wanted]
    if enough:
        best, share = min(enough, key=lambda pair: (pair[0].weight_bytes, -pair[1]))
        why = f"the lightest of {len(told)} that keeps at least {wanted:.0%} of the gain"
    else:
        best, share = max(told, key=lambda pair: pair[1])
        why = f"which keeps most; none of {len(told)} keeps {wanted:.0%} of the gain"
    return f"recommended: {best.form} (keeps {share:.1%} in {best.weight_bytes / 1e6:,.1f} MB), {why}"
