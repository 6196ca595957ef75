"""Does the merged model say what base + adapter says: measured one model at a time, judged from the measurements.

Logit error and agreement tell how far the rounding of W0 + s B A into the base's dtype moved the outputs; the share of
the gain kept, (L_base - L_merged) / (L_base - L_adapter) on given data, tells whether that matters. Where the drop in
loss cannot be told from 0 on that data, there is no share. Does not know how the merge was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lofi.errors import ProofError
from lofi.evaluate.intervals import Interval, bootstrap, paired_test, ratio
from lofi.evaluate.perplexity import token_losses
from lofi.merge.probes import Probes

_POSITIONS = 4  # of each prompt, its last ones: 16 prompts x 4 x 150k words are 38 MiB


@dataclass(frozen=True)
class Measured:
    """What one model said: logits (P, V) at the probed positions, losses (N, 2) as sums and token counts."""

    logits: Tensor
    losses: np.ndarray | None = None


@dataclass(frozen=True)
class Verdict:
    """How near the merged model is to base + adapter, and what of the adapter's gain it kept."""

    max_logit_error: float
    mean_logit_error: float
    adapter_effect: float
    """Mean absolute difference that the adapter makes to the base's logits: the measure of the errors above."""
    kl: float
    """Mean KL(base + adapter || merged) of the next-token distributions, in nats."""
    top1_agreement: float
    share_kept: Interval | None
    """None without data, or where the interval of the drop in loss includes 0."""
    losses: dict[str, Interval] = field(default_factory=dict)
    positions: int = 0
    examples: int = 0
    source: str = ""

    def lines(self) -> list[str]:
        """The verdict in words, for people."""
        said = [
            f"logits: mean error {self.mean_logit_error:.3g}, max {self.max_logit_error:.3g} "
            f"(the adapter itself moves them by {self.adapter_effect:.3g} on average)",
            f"next token: {self.top1_agreement:.1%} the same, KL {self.kl:.3g} nats "
            f"({self.positions} positions, {self.source})",
        ]
        if self.losses:
            named = ", ".join(f"{who} {loss.value:.4f}" for who, loss in self.losses.items())
            said.append(f"loss on {self.examples} examples: {named}")
            said.append(f"share of the adapter's gain kept: {self._share_words()}")
        return said

    def _share_words(self) -> str:
        if self.share_kept is None:
            return "not said, because on this data the gain itself cannot be told from 0"
        value, low, high = self.share_kept
        return f"{value:.1%}" + (f" ({low:.1%} to {high:.1%})" if low is not None and high is not None else "")

    def rows(self) -> list[dict[str, Any]]:
        """The figures as `--json` rows: who, metric, value, low, high, n."""
        names = ("max_logit_error", "mean_logit_error", "adapter_effect", "kl", "top1_agreement")
        rows = [_row("merged", name, Interval(getattr(self, name), None, None), self.positions) for name in names]
        rows += [_row(who, "loss", loss, self.examples) for who, loss in self.losses.items()]
        share = self.share_kept or Interval(None, None, None)  # type: ignore[arg-type]
        return [*rows, _row("merged", "share_kept", share, self.examples)]


def _row(who: str, metric: str, figure: Interval, n: int) -> dict[str, Any]:
    return {"who": who, "metric": metric, "value": figure.value, "low": figure.low, "high": figure.high, "n": n}


@torch.no_grad()
def measure(model: nn.Module, probes: Probes) -> Measured:
    """Ask a model the probes, as it stands (its active adapters speak); dropout is off and nothing is left changed."""
    from lofi.models.probe import undisturbed

    with undisturbed(model):
        told = probes.answers or probes.prompts
        logits = torch.cat([_logits(model, *pair) for pair in zip(probes.prompts, told, strict=True)])  # (P, V)
    return Measured(logits, _losses(model, probes.examples) if probes.examples else None)


def _logits(model: Any, ids: Sequence[int], answer: Sequence[int]) -> Tensor:
    """At the last positions of a prompt, or of the answer that a decoder reads beside it."""
    tokens, labels = (torch.tensor([list(one)], device=next(model.parameters()).device) for one in (ids, answer))
    more = {}
    if getattr(model.config, "is_encoder_decoder", False):
        more["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    logits = model(input_ids=tokens, **more).logits
    return logits.reshape(-1, logits.shape[-1])[-_POSITIONS:].float().cpu()


def _losses(model: Any, examples: Sequence[Any]) -> np.ndarray:
    if examples[0].task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return token_losses(model, examples)
    from lofi.models.probe import undisturbed

    with undisturbed(model):
        return np.array([_class_loss(model, example) for example in examples])


def _class_loss(model: Any, example: Any) -> tuple[float, int]:
    """Loss of one classified example by the model's own definition, times what it is a mean over."""
    device = next(model.parameters()).device
    ids = torch.tensor([example.input_ids], device=device)
    labels = torch.tensor([example.labels], device=device)
    return float(model(input_ids=ids, labels=labels).loss) * example.n_trained, example.n_trained


def judge(base: Measured, adapted: Measured, merged: Measured, probes: Probes) -> Verdict:
    """Compare what base, base + adapter and the merged model said to the same probes.

    Raises  ProofError where the merged model says NaN or infinity
    """
    if not bool(torch.isfinite(merged.logits).all()):
        raise ProofError("the merged model's logits are not finite; merge into a wider dtype or check the base")
    error = (merged.logits - adapted.logits).abs()
    share, losses = _share(base.losses, adapted.losses, merged.losses)
    return Verdict(
        max_logit_error=float(error.max()),
        mean_logit_error=float(error.mean()),
        adapter_effect=float((adapted.logits - base.logits).abs().mean()),
        kl=_kl(adapted.logits, merged.logits),
        top1_agreement=float((merged.logits.argmax(-1) == adapted.logits.argmax(-1)).float().mean()),
        share_kept=share,
        losses=losses,
        positions=len(adapted.logits),
        examples=0 if adapted.losses is None else len(adapted.losses),
        source=probes.source,
    )


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean over rows of sum p (log p - log q), in float64."""
    log_p, log_q = (torch.log_softmax(logits.double(), -1) for logits in (p, q))
    return max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))


def _share(
    base: np.ndarray | None, adapted: np.ndarray | None, merged: np.ndarray | None
) -> tuple[Interval | None, dict[str, Interval]]:
    if base is None or adapted is None or merged is None:
        return None, {}
    losses = {who: bootstrap(rows, ratio) for who, rows in (("base", base), ("adapter", adapted), ("merged", merged))}
    drop = paired_test(base, adapted, ratio)
    if drop.low is None or drop.high is None or drop.low <= 0 <= drop.high:
        return None, losses
    table = np.stack([base[:, 0], adapted[:, 0], merged[:, 0]], axis=1)  # (N, 3) summed losses of the same tokens
    return bootstrap(table, _kept), losses


def _kept(sums: np.ndarray) -> np.ndarray:
    """(L_base - L_merged) / (L_base - L_adapter); the token count is the same and cancels."""
    gain = sums[..., 0] - sums[..., 1]
    return np.divide(sums[..., 0] - sums[..., 2], gain, out=np.zeros_like(gain), where=gain != 0)


def compare_models(adapted: nn.Module, merged: nn.Module, probes: Probes) -> Verdict:
    """The verdict for two open models; the base is `adapted` with its adapters off."""
    from lofi.adapters.switch import adapters_off

    with adapters_off(adapted):
        base = measure(adapted, probes)
    return judge(base, measure(adapted, probes), measure(merged, probes), probes)


def refuse_below(verdict: Verdict, min_kept: float | None) -> None:
    """Raise ProofError if less than `min_kept` of the gain is kept, or if the data cannot tell."""
    if min_kept is None:
        return
    if verdict.share_kept is None:
        raise ProofError(
            f"min_kept is {min_kept}, but on these {verdict.examples} examples the adapter's own gain cannot be told "
            "from 0, so nothing can be kept of it; give data like what it was trained for, or more of it"
        )
    if verdict.share_kept.value < min_kept:
        raise ProofError(
            f"the merged model keeps {verdict.share_kept.value:.3f} of the adapter's gain, less than min_kept "
            f"{min_kept}; keep the adapter beside the base, or merge into a wider dtype"
        )
