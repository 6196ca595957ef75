"""What quantizing a folder did and what it cost, for people, for `--json`, and beside the quantized model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lofi.evaluate.intervals import Interval
from lofi.files.quantized import Packed

FILE = "lofi_quantize.json"
_WORST = 5


@dataclass(frozen=True)
class Cost:
    """How far the quantized model's answers are from the dense model's, on the same probes."""

    mean_logit_error: float
    max_logit_error: float
    logit_size: float
    """Mean magnitude of the dense model's logits: the measure of the errors above."""
    kl: float
    """Mean KL(dense || quantized) of the next-token distributions, in nats."""
    top1_agreement: float
    positions: int
    source: str
    losses: dict[str, Interval] = field(default_factory=dict)
    """On data: loss of the dense and of the quantized model, nats a token (or a label)."""
    examples: int = 0


@dataclass(frozen=True)
class QuantizeReport:
    """Where the quantized model is, what it was made of, its size and its errors."""

    output: str
    base: str
    packed: Packed
    bytes_before: int
    bytes_after: int
    seconds: float
    """Reading, quantizing and writing; not the proofs."""
    errors: dict[str, float]
    """Packed weight -> relative error of its weight, |W - Q(W)| / |W| in the Frobenius norm, largest first."""
    cost: Cost

    def lines(self) -> list[str]:
        """The report in words."""
        cost, worst = self.cost, list(self.errors.items())[:_WORST]
        mean = sum(self.errors.values()) / len(self.errors)
        said = [
            f"quantized {self.base} in {self.seconds:.1f} s: {_size(self.bytes_before)} became "
            f"{_size(self.bytes_after)} ({self.bytes_after / self.bytes_before:.0%})",
            *self.packed.lines(),
            f"weights: mean relative error {mean:.4f}; worst: "
            + ", ".join(f"{name.removesuffix('.weight')} {error:.4f}" for name, error in worst),
            f"logits: mean error {cost.mean_logit_error:.3g}, max {cost.max_logit_error:.3g} "
            f"(their mean size is {cost.logit_size:.3g})",
            f"next token: {cost.top1_agreement:.1%} the same, KL {cost.kl:.3g} nats "
            f"({cost.positions} positions, {cost.source})",
        ]
        if cost.losses:
            named = ", ".join(f"{who} {loss.value:.4f}" for who, loss in cost.losses.items())
            said.append(f"loss on {cost.examples} examples: {named}")
        return [*said, f"written to {self.output}, re-read and compared"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the figures are under "results", as rows."""
        return {
            "output": self.output,
            "base": self.base,
            "quantization": self.packed.to_dict(),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": round(self.seconds, 3),
            "relative_errors": dict(self.errors),
            "probes": self.cost.source,
            "results": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """The figures as `--json` rows: who, metric, value, low, high, n."""
        who, cost = self.packed.kind, self.cost
        names = ("mean_logit_error", "max_logit_error", "logit_size", "kl", "top1_agreement")
        rows = [_row(who, name, Interval(getattr(cost, name), None, None), cost.positions) for name in names]
        rows += [_row(one, "loss", loss, cost.examples) for one, loss in cost.losses.items()]
        mean = sum(self.errors.values()) / len(self.errors)
        return [*rows, _row(who, "mean_relative_weight_error", Interval(mean, None, None), len(self.errors))]


def _row(who: str, metric: str, figure: Interval, n: int) -> dict[str, Any]:
    return {"who": who, "metric": metric, "value": figure.value, "low": figure.low, "high": figure.high, "n": n}


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
