"""May several sequences share one row? Asked of the model itself, by a probe, never of a list of names.

Packed means: sequences joined in one row, position_ids starting again at each, no attention mask, no cache.
transformers builds block-diagonal attention from that for most decoders; OPT and BLOOM ignore it without a word, and
recurrent layers carry their state across. Knows nothing of data or of how batches are made.
Rejected: comparing with the separate sequences alone; in bf16 a small leak hides below the rounding.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lofi.models.probe import random_ids, undisturbed

_FIRST, _SECOND = 11, 13  # tokens of the two probe sequences
_NO_LEAK = 1e-6  # masked attention weights are exact zeros: a neighbour moves nothing at all, in any dtype
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Verdict:
    """Whether packing gives the separate sequences' logits, and why."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def packing_verdict(model: nn.Module) -> Verdict:
    """Prove or refute that a packed row gives every sequence the logits it has alone.

    Two questions on random ids: (1) another first sequence must leave the second's logits as they are (1e-6 in any
    dtype; with routed experts a tenth of the limit below); (2) packed logits must equal separate ones (rms, relative to
    the logits' spread; limit 1e-4 in float32, 1e-1 in bfloat16: 48 random layers of rounding reach 5e-2, a wrong
    position 6e-1). The model and the random state are left as they were.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return Verdict(False, "encoder-decoder models take one sequence a row, so batches are padded")
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" not in accepted or model.get_output_embeddings() is None:
        return Verdict(False, f"{type(model).__name__} takes no position_ids or has no output head; batches are padded")
    try:
        with torch.no_grad(), undisturbed(model):
            leak, gap, limit = _measure(model)
            leak_limit = limit / 10 if _routes(model) else _NO_LEAK
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return Verdict(False, f"the probe failed with {type(error).__name__}: {str(error)[:120]}; batches are padded")
    return _judge(leak, leak_limit, gap, limit)


def _routes(model: nn.Module) -> bool:
    """Does the model send tokens to experts? Their products then change shape, hence rounding, with the neighbours."""
    return "experts" in str(model.config.to_dict())


def _judge(leak: float, leak_limit: float, gap: float, limit: float) -> Verdict:
    if not leak <= leak_limit:
        return Verdict(False, f"sequences in one row see each other (logits move by {leak:.1e}), so batches are padded")
    if not gap <= limit:
        return Verdict(False, f"packed logits differ from separate ones by {gap:.1e}, so batches are padded")
    return Verdict(True, f"packed logits equal separate ones (off by {gap:.1e}; a neighbour moves them by {leak:.1e})")


def _measure(model: nn.Module) -> tuple[float, float, float]:
    """How far a neighbour moves the logits, how far packed is from separate, and the limit for the dtype."""
    first, other = (random_ids(model, rows=1, length=_FIRST, seed=seed) for seed in (3, 4))
    second = random_ids(model, rows=1, length=_SECOND, seed=5)
    packed = _logits(model, first, second)  # (T, V)
    beside_other = _logits(model, other, second)
    separate = torch.cat([_logits(model, first), _logits(model, second)])
    leak = _distance(beside_other[_FIRST:], packed[_FIRST:])
    return leak, _distance(packed, separate), _ROUNDING.get(packed.dtype, 1e-4)


def _logits(model: nn.Module, *sequences: Tensor) -> Tensor:
    ids = torch.cat(sequences, dim=1)
    positions = torch.cat([torch.arange(s.shape[1], device=ids.device) for s in sequences])[None]
    return model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False).logits[0]  # (T, V)


def _distance(a: Tensor, b: Tensor) -> float:
    """Root mean square difference over the spread of the logits within a position; NaN stays NaN."""
    a, b = a.double(), b.double()
    spread = (b - b.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((a - b).square().mean().sqrt() / spread.clamp_min(1e-300))
