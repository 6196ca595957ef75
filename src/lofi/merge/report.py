"""What a merge on disk did and how good the result is, for people, for `--json`, and beside the merged model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.merge.alternatives import Alternative
from lofi.merge.form import Form
from lofi.merge.verdict import Verdict

FILE = "lofi_merge.json"


@dataclass(frozen=True)
class MergeReport:
    """Where the merged model is, what it was made of and by which road, and the verdict on it."""

    output: str
    base: str
    adapter: str
    form: Form
    """As it was made: "auto" only where there was nothing to choose."""
    road: str
    """"shard by shard", "rounded ...", or "through the loaded model" with the reason."""
    changed: int
    verdict: Verdict
    notes: Sequence[str] = field(default_factory=list)
    alternatives: Sequence[Alternative] = ()
    recommendation: str | None = None

    def lines(self) -> list[str]:
        """The report in words."""
        head = f"merged {self.adapter} into {self.base}: {self.changed} tensors changed, {self.road}"
        tried = [f"  {alternative.line()}" for alternative in self.alternatives]
        table = ["measured in memory:", *tried] if tried else []
        advice = [self.recommendation] if self.recommendation else []
        return [head, *self.notes, *self.verdict.lines(), *table, *advice, f"written to {self.output}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the figures are under "results", as rows."""
        return {
            "output": self.output,
            "base": self.base,
            "adapter": self.adapter,
            "into": self.form.into,
            "rounding": None if self.form.into == "dense" else self.form.rounding,
            "onto": self.form.onto,
            "road": self.road,
            "changed": self.changed,
            "notes": list(self.notes),
            "recommendation": self.recommendation,
            "probes": self.verdict.source,
            "results": [*self.verdict.rows(), *(row for a in self.alternatives for row in a.rows())],
        }
