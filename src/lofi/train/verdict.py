"""What the curve says, in words: where the best step was, and whether the run went on to learn its rows by heart.

Knows  rows of `metrics.jsonl`. Rejected: a verdict from the training loss alone (it falls in both cases).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RISE = 0.01  # a rise of the validation loss below one per cent of it is called noise


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The best step, its validation loss (nats per item), and the sentence about it."""

    best_step: int | None
    best_loss: float | None
    overfitted: bool
    words: str


def judge(rows: Sequence[dict[str, Any]]) -> Verdict:
    """Read a run's rows (step, loss or eval_loss) into a verdict.

    Overfitted = after the best step the validation loss rose by more than 1 % while the training loss fell.
    """
    measured = [(int(r["step"]), float(r["eval_loss"])) for r in rows if "eval_loss" in r]
    base = next((loss for step, loss in measured if step == 0), None)
    checks = [check for check in measured if check[0] > 0]
    losses = [(int(r["step"]), float(r["loss"])) for r in rows if "loss" in r]
    if not checks:
        return Verdict(best_step=None, best_loss=None, overfitted=False, words=_unchecked(losses))
    step, best = min(checks, key=lambda c: (c[1], c[0]))
    last_step, last = checks[-1]
    fell = _fell(losses, step, last_step)
    if last_step > step and last > best * (1 + RISE) and fell:
        words = (
            f"overfitting: after step {step} the validation loss rose from {best:.4f} to {last:.4f} while the training "
            f"loss fell from {fell[0]:.4f} to {fell[1]:.4f}; the best step is kept, fewer epochs or more rows may help"
        )
        return Verdict(best_step=step, best_loss=best, overfitted=True, words=words)
    words = _words(step, best, last_step, last)
    if base is not None:
        words += (
            f"; it was {base:.4f} before" if best < base else f"; it never fell below the untrained model's {base:.4f}"
        )
    return Verdict(best_step=step, best_loss=best, overfitted=False, words=words)


def _words(step: int, best: float, last_step: int, last: float) -> str:
    if step == last_step:
        return f"validation loss {best:.4f}, the best at the last step ({step}); more steps may still help"
    if last > best * (1 + RISE):
        return f"validation loss rose from {best:.4f} (step {step}) to {last:.4f} (step {last_step}); the best is kept"
    return f"validation loss {best:.4f} at step {step}, level since then ({last:.4f} at step {last_step})"


def _unchecked(losses: list[tuple[int, float]]) -> str:
    if not losses:
        return "nothing was measured; set train.logging_steps below the number of steps"
    return (
        f"training loss {losses[0][1]:.4f} at step {losses[0][0]}, {losses[-1][1]:.4f} at step {losses[-1][0]}; "
        "without data.validation nothing says whether it generalises"
    )


def _fell(losses: list[tuple[int, float]], best_step: int, last_step: int) -> tuple[float, float] | None:
    """(training loss around the best step, at the end) where it fell between them."""
    before = [loss for step, loss in losses if step <= best_step]
    after = [loss for step, loss in losses if best_step < step <= last_step]
    if not before or not after or after[-1] >= before[-1]:
        return None
    return before[-1], after[-1]
