"""Which matrices under one budget, on two models: lofi-tiny (examples/studies/matrices.yaml) and stories260k.

Budget  7 single-thread minutes: 36 runs of about 12 s, judged by the loss of 200 rows.
"""

from __future__ import annotations

from typing import Any

from results.lab import Lab, Section, figure, shown
from results.methods import first_rows, share


def run(lab: Lab) -> Section:
    tiny = lab.compare("examples/studies/matrices.yaml", output="matrices-lofi-tiny")
    train = first_rows(lab, "e2e_nlg", "train", count=2000)
    test = first_rows(lab, "e2e_nlg", "validation", count=200)
    words = (f"model={lab.model('stories260k')}", f"data.train={train}", f"data.test={test}")
    stories = lab.compare("results/studies/matrices-stories260k.yaml", *words, output="matrices-stories260k")
    found = [*_rows("lofi-tiny, SQL", *tiny), *_rows("stories260k, e2e_nlg", *stories)]
    return Section(
        "Which matrices, under one budget",
        "LoRA of equally many parameters (stories260k: within 2.5 %) on one kind of matrix or several, every update "
        "multiplied by 2. Loss of held-out rows, mean over two seeds with its 95 % interval over seeds and examples; "
        "the best first.",
        ["model, data", "adapted", "trained", "loss"],
        found,
    )


def _rows(what: str, answer: dict[str, Any], records: list[dict[str, Any]]) -> list[list[str]]:
    arms = list(dict.fromkeys(record["arm"] for record in records if record["method"] != "base"))
    arms.sort(key=lambda arm: figure(answer, "loss", arm)["value"])
    return [[what, arm, share(records, arm), shown(figure(answer, "loss", arm))] for arm in arms]
