"""What a merge on disk did and how good the result is, for people, for `--json`, and beside the merged model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lofi.merge.verdict import Verdict

FILE = "lofi_merge.json"


@dataclass(frozen=True)
class MergeReport:
    """Where the merged model is, what it was made of and by which road, and the verdict on it."""

    output: str
    base: str
    adapter: str
    road: str
    """"shard by shard", or "through the loaded model" with the reason."""
    changed: int
    verdict: Verdict
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report in words."""
        head = f"merged {self.adapter} into {self.base}: {self.changed} tensors changed, {self.road}"
        return [head, *self.notes, *self.verdict.lines(), f"written to {self.output}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the figures are under "results", as rows."""
        return {
            "output": self.output,
            "base": self.base,
            "adapter": self.adapter,
            "road": self.road,
            "changed": self.changed,
            "notes": list(self.notes),
            "probes": self.verdict.source,
            "results": self.verdict.rows(),
        }
