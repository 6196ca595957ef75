"""Records of runs with known figures, for the tests of what a study says."""

from __future__ import annotations

from typing import Any

import numpy as np

from lofi.study.record import Measured, RunRecord

LATENCY = {"latency_ms": 24.0, "latency_merged_ms": 20.0, "latency_base_ms": 20.0}


def means(values: Any) -> Measured:
    """A mean of one number per row."""
    column = np.asarray(values, dtype=np.float64)
    return Measured(np.stack([column, np.ones_like(column)], axis=1), "mean")


def run(arm: str, seed: int | None, values: Any, metric: str = "rouge1", **figures: float | None) -> RunRecord:
    """A finished run with one metric; its method is the arm's first word, its rank what stands after "r="."""
    method, _, rest = arm.partition(" ")
    rank = {"lora.r": int(rest.rpartition("r=")[2])} if "r=" in rest else {}
    measured = values if isinstance(values, Measured) else means(values)
    return RunRecord(
        name=arm if seed is None else f"{arm.replace(' ', '-')}-s{seed}", arm=arm, method=method, seed=seed,
        overrides={"method": method, **rank, "train.seed": seed}, figures=dict(figures), measures={metric: measured},
    )  # fmt: skip


def failed(arm: str, seed: int, error: str = "the loss is not finite at step 4") -> RunRecord:
    return RunRecord(
        name=f"{arm}-s{seed}", arm=arm, method=arm.partition(" ")[0], seed=seed, status="failed", error=error
    )


def rows(n: int = 200, seed: int = 0) -> np.ndarray:
    """How hard each of n examples is: shared by all arms, as in a real study."""
    return np.random.default_rng(seed).normal(0.5, 0.2, n)


def arm_runs(
    arm: str,
    quality: float,
    *,
    seeds: int = 3,
    luck: float = 0.002,
    noise: float = 0.05,
    n: int = 200,
    **figures: float,
) -> list[RunRecord]:
    """Runs of an arm that is `quality` above the examples' difficulty, give or take a seed's luck and a row's noise."""
    rng = np.random.default_rng(sum(map(ord, arm)))
    figures = {"trainable": 1000.0, **figures}
    return [
        run(arm, seed, rows(n) + quality + rng.normal(0, luck) + rng.normal(0, noise, n), **figures)
        for seed in range(seeds)
    ]
