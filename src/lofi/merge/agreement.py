"""Whether adapters can be added up at all: one base, one task, and what is no sum of updates the same in all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lofi.errors import LofiWarning, ProofError, RequestError
from lofi.files import fingerprint
from lofi.files.adapter_folder import RECORD, AdapterFolder
from lofi.files.updates import LowRank


def same_base(read: Mapping[str, AdapterFolder]) -> None:
    """Raise ProofError for adapters of different bases; warn where one does not say which it belongs to."""
    known = {name: folder.record["base"] for name, folder in read.items() if folder.record.get("base")}
    for name in read.keys() - known.keys():
        warnings.warn(
            f"{read[name].path} has no {RECORD}, so whether it is of the same base cannot be proved",
            LofiWarning,
            stacklevel=3,
        )
    for name, base in list(known.items())[1:]:
        first = next(iter(known))
        reasons = fingerprint.compare(known[first], base)
        if reasons:
            raise ProofError(
                f"{first} and {name} were trained on different bases ({'; '.join(reasons[:3])}), so their sum means "
                "nothing; combine adapters of one base"
            )


def same_kind(read: Mapping[str, AdapterFolder]) -> None:
    """Raise RequestError for adapters of different tasks or labels; what one does not say is no difference."""
    for what, of in (
        ("task", lambda folder: folder.config.task_type),
        ("label list", lambda folder: folder.record.get("labels")),
    ):
        told = {name: of(folder) for name, folder in read.items()}
        values = [value for value in told.values() if value is not None]
        if any(value != values[0] for value in values):
            named = ", ".join(f"{name}: {value}" for name, value in told.items())
            raise RequestError(f"the adapters do not share one {what} ({named}); combine adapters of one {what}")


def same_others(others: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What is no sum, once: heads and other full copies, biases, token rows.

    Raises  RequestError where it is not the same in all adapters
    """
    first, *rest = others
    for name in rest:
        for key in sorted(others[first].keys() | others[name].keys()):
            one, other = others[first].get(key), others[name].get(key)
            if one is None or other is None:
                lacks = first if one is None else name
                raise RequestError(
                    f"{lacks} has no {key}, which the other adapter trains in full and which is no sum of updates; "
                    "combine adapters that train the same modules in full, or none"
                )
            if one.shape != other.shape or not torch.equal(one, other):
                raise RequestError(
                    f"{key} is trained in full and differs between {first} and {name}, and two replacements do not add "
                    "up; combine adapters that share it, or that have none"
                )
    return others[first]


def same_experts(read: Mapping[str, AdapterFolder], parts: Mapping[str, Sequence[LowRank]]) -> None:
    """Raise RequestError for other expert parameters: PEFT's keys of one depend on which others are adapted."""
    known = {
        name: (sorted({u.name for u in parts[name] if u.kind == "experts"}), sorted(expert_parameters(folder)))
        for name, folder in read.items()
        if any(update.kind == "experts" for update in parts[name])
    }
    for name, (_, parameters) in known.items():
        first = next(iter(known))
        if known[name] != known[first]:
            raise RequestError(
                f"{first} and {name} adapt other expert parameters ({', '.join(known[first][1])} and "
                f"{', '.join(parameters)}); combine adapters with the same target_parameters"
            )


def expert_parameters(folder: AdapterFolder) -> Sequence[str]:
    """target_parameters of a LoRA folder."""
    return folder.config.target_parameters or ()  # type: ignore[attr-defined]
