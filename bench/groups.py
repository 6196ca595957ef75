"""The claims by page: what is measured together and where its figures are published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Group:
    """Claims, in the order of their page, and the page."""

    name: str
    claims: tuple[str, ...]
    page: Path


PERFORMANCE = Group(
    "performance",
    (
        "nf4_error", "outliers", "nf4_convert", "nf4_rows", "nf4_linear", "int8_linear", "quantized_step", "decode",
        "load", "memory", "headline", "gpu", "lora_step", "merged_forward", "attention",
    ),
    ROOT / "docs" / "performance.md",
)  # fmt: skip
SERVING = Group(
    "serving",
    (
        "batched_adapters", "adapter_switch", "serve_throughput", "serve_generate_loop", "serve_equal", "serve_load",
        "serve_sizing", "gpu_decode",
    ),
    ROOT / "docs" / "serving.md",
)  # fmt: skip
GROUPS = {group.name: group for group in (PERFORMANCE, SERVING)}
NEEDS_A_GPU = ("gpu", "gpu_decode")
"""Asked for by name where there is none, they say so and return nothing."""


def group_of(claim: str) -> Group:
    return next(group for group in GROUPS.values() if claim in group.claims)


def chosen(names: list[str]) -> list[str]:
    """The claims that these names mean: a group's name stands for its claims; all of them where none is named."""
    named = [claim for name in names for claim in (GROUPS[name].claims if name in GROUPS else (name,))]
    return list(dict.fromkeys(named or [claim for group in GROUPS.values() for claim in group.claims]))
