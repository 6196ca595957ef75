"""What was written as GGUF and how it was proved, in words and as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lofi.export.gguf_proof import Agreement, Rounding


@dataclass(frozen=True)
class GgufReport:
    """One GGUF file: where it is, what it holds, how exact it is."""

    output: str
    source: str
    kind: str
    """"model" or "adapter"."""
    architecture: str
    dtype: str
    tensors: int
    bytes: int
    rounding: Rounding
    kept: tuple[str, ...] = ()
    """Matrices that are f16 in a q8_0 file, because 32 does not divide their rows."""
    agreement: Agreement | None = None
    """None for an adapter, and for a model that memory has no room to open."""
    tokenizer: str = ""
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report in words."""
        said = [
            f"wrote the {self.kind} {self.source} as GGUF: {self.tensors} tensors, {self.dtype}, {self.bytes:,} bytes",
            self._exactness(),
        ]
        if self.kept:
            said.append(f"{len(self.kept)} matrices are f16, as 32 does not divide their rows, first: {self.kept[0]}")
        if self.agreement is not None:
            said.append(self._agreement(self.agreement))
        elif self.kind == "model":
            said.append("logits were not compared: there is no room in memory to open the model in float32")
        return [*said, *self.notes, f"written to {self.output}"]

    def _exactness(self) -> str:
        if not self.rounding.rounded:
            return f"read back: every tensor is the {self.kind}'s, bit for bit"
        held = self.rounding
        what = "tensors" if self.kind == "model" else "updates"
        return (
            f"read back: {held.rounded} {what} are rounded, by {held.mean:.2g} of their norm on average and "
            f"{held.worst:.2g} at most ({held.worst_name}); the others are bit for bit the same"
        )

    @staticmethod
    def _agreement(held: Agreement) -> str:
        return (
            f"logits with the file's weights: mean error {held.mean_logit_error:.2g}, max {held.max_logit_error:.2g} "
            f"(they spread by {held.spread:.2g}); next token {held.top1:.1%} the same ({held.positions} positions)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the figures are under "results", as rows."""
        figures: dict[str, float] = {
            "bytes": self.bytes,
            "rounding_mean": self.rounding.mean,
            "rounding_max": self.rounding.worst,
        }
        if self.agreement is not None:
            held = self.agreement
            figures |= {"mean_logit_error": held.mean_logit_error, "max_logit_error": held.max_logit_error}
            figures["top1_agreement"] = held.top1
        return {
            "output": self.output,
            "source": self.source,
            "kind": self.kind,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "tensors": self.tensors,
            "kept": list(self.kept),
            "tokenizer": self.tokenizer,
            "notes": list(self.notes),
            "results": [
                {"who": "gguf", "metric": metric, "value": value, "low": None, "high": None, "n": self._n(metric)}
                for metric, value in figures.items()
            ],
        }

    def _n(self, metric: str) -> int:
        told = metric.endswith(("logit_error", "agreement")) and self.agreement is not None
        return self.agreement.positions if told and self.agreement else self.tensors
