"""Subspace similarity (LoRA paper, section 7.2) and amplification (section 7.3): by chance, of one seed, of others."""

from __future__ import annotations

import math
from pathlib import Path

from results.lab import Lab, Section
from results.quantized import jobs

DRAWS = 400
NULLS = ((256, 1, 1), (256, 8, 8), (256, 8, 64), (704, 16, 16), (1024, 64, 64))


def run(lab: Lab) -> Section:
    tiny = next(job for job in jobs(lab) if job.name == "lofi-tiny")
    seeds = [tiny.train(lab, "lora", seed) for seed in (0, 1, 2)]
    packed = tiny.train(lab, "qlora", 0)
    narrow = lab.train(
        tiny.recipe, "--model", tiny.model, "--data", lab.data(tiny.data), "--seed", "0", *tiny.changes, "lora.r=4",
        "lora.lora_alpha=8", output="subspaces-r4-0",
    )[1]  # fmt: skip
    rows = [_null(*sizes) for sizes in NULLS]
    pairs = {
        "r=16, seeds 0 and 1": (seeds[0], seeds[1]),
        "r=16, seeds 0 and 2": (seeds[0], seeds[2]),
        "r=16, seed 0, dense and NF4 base": (seeds[0], packed),
        "r=4 and r=16, seed 0": (narrow, seeds[0]),
        "r=4 and r=16, seeds 0 and 1": (narrow, seeds[1]),
    }
    for name, (one, other) in pairs.items():
        rows += _alike(lab, name, one, other)
    rows += _amplified(lab, "r=16, seed 0", seeds[0]) + _amplified(lab, "r=4, seed 0", narrow)
    return Section(
        "Subspaces of updates",
        "phi(i, j) of two random subspaces is max(i, j) / d on average, within the sampling error; what do two trained "
        "adapters of lofi-tiny (english_quotes) share above that, and how much do they amplify?",
        ["what", "found", "by chance, or in the paper"],
        rows,
        notes=[
            "phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j), the paper's eq. 4; means over 42 modules. A: right-singular "
            "vectors of A as in eq. 4; reads and writes: right- and left-singular vectors of the whole update.",
            "Amplification is ||dW||_F / ||U^T W V^T||_F, medians over 42 modules; the paper's GPT-3 query matrix has "
            "21.5 at r=4 and 1.9 at r=64 (table 7).",
        ],
    )


def _null(dimension: int, i: int, j: int) -> list[str]:
    import torch

    from lofi.adapters.algebra import expected_similarity, similarities

    generator = torch.Generator().manual_seed(dimension + 1000 * i + j)
    found = []
    for _ in range(DRAWS):
        drawn = (torch.randn(dimension, k, generator=generator, dtype=torch.float64) for k in (i, j))
        one, other = (torch.linalg.qr(matrix).Q for matrix in drawn)
        found.append(float(similarities(one, other)[i - 1, j - 1]))
    mean = sum(found) / DRAWS
    error = math.sqrt(sum((value - mean) ** 2 for value in found) / (DRAWS - 1) / DRAWS)
    expected = expected_similarity(i, j, dimension)
    off = abs(mean - expected) / error
    return [
        f"random pairs, phi({i}, {j}), d = {dimension}",
        f"{mean:.5f} +- {error:.5f} ({DRAWS} pairs; {off:.1f} standard errors off)",
        f"{i if i > j else j} / {dimension} = {expected:.5f}",
    ]


def _alike(lab: Lab, name: str, one: Path, other: Path) -> list[list[str]]:
    mean = lab.lofi("inspect", one, "--against", other, label=f"inspect {name}")["mean"]
    words = {"A": "A", "input": "what is read", "output": "what is written"}
    return [
        [
            f"{name}: {words[view]}",
            f"phi(1, 1) {said['first']:.3f}, phi({said['k']}, {said['k']}) {said['full']:.3f}",
            f"{said['null_first']:.3f}, {said['null_full']:.3f}",
        ]
        for view, said in mean.items()
    ]


def _amplified(lab: Lab, name: str, folder: Path) -> list[list[str]]:
    modules = lab.lofi("inspect", folder, label=f"inspect {name}")["modules"]

    def middle(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    beside = [module["amplification"] for module in modules]
    factor, update, inside, random = (
        middle([each[key] for each in beside]) for key in ("factor", "update", "weight", "random")
    )
    return [
        [
            f"{name}: amplification",
            f"{factor:.2f} (||dW|| {update:.2f}, ||U^T W V^T|| {inside:.2f})",
            f"||U^T W V^T|| {random:.2f} in random directions",
        ]
    ]
