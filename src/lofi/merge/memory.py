"""Merging an open model: the adapter's update is added into new tensors, and the result is compared with what it was.

The arithmetic is `lofi.adapters.merge`; this module adds the proof.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lofi.adapters.merge import merge_in_memory, refuse_unmergeable
from lofi.adapters.switch import adapters_off, using
from lofi.merge.packed import settle
from lofi.merge.probes import random_probes
from lofi.merge.verdict import Verdict, judge, measure


def merge_and_unload(model: nn.Module, name: str = "default", inplace: bool = False) -> Any:
    """A plain model with one adapter merged in: W0 + s B A summed in float32, rounded once to the base's dtype.

    New tensors for the targets, the rest shared, the given model as it was; `inplace=True` consumes it. Targets in nf4
    or int8 become dense, the sum being of what their codes stand for; other linears keep their codes. The result's
    `.lofi_merge_report` is a Verdict (logit error, KL, top-1 agreement on seeded random ids; the share of the gain
    needs data: see `merge_folder`), None for modules that do not take token ids.
    Raises  TargetError for an unknown adapter, or one that no weight can hold; ProofError if the merged
            model's logits are not finite
    """
    refuse_unmergeable(model, name)
    probes = random_probes(model) if _takes_ids(model) else None
    if probes is not None:
        with adapters_off(model):
            base = measure(model, probes)
        with using(model, name):
            adapted = measure(model, probes)
    merged: Any = merge_in_memory(model, name, inplace=inplace)
    if hasattr(merged, "hf_quantizer"):
        merged = settle(merged)
    report: Verdict | None = None
    if probes is not None:
        report = judge(base, adapted, measure(merged, probes), probes)
    merged.lofi_merge_report = report
    return merged


def _takes_ids(model: Any) -> bool:
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and hasattr(config.get_text_config(), "vocab_size")
