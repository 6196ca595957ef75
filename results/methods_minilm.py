"""The methods on a real encoder, three seeds: examples/studies/methods-encoder.yaml on sentence_polarity.

Budget  9 single-thread minutes: 21 runs, each about 16 s of training (60 steps of 1,024 tokens) and 8 s of judging on
every second of the official test rows.
"""

from __future__ import annotations

from results.encoders import minilm
from results.lab import Lab, Section, figure, shown
from results.methods import first_rows, mean_of, share

STUDY = "examples/studies/methods-encoder.yaml"
FULL, WITHIN = "full", 0.05
TRAIN_ROWS, EVERY = 4000, 2


def run(lab: Lab) -> Section:
    train = first_rows(lab, "sentence_polarity", "train", count=TRAIN_ROWS)
    test = first_rows(lab, "sentence_polarity", "test", every=EVERY)
    words = (f"model={minilm()}", f"data.train={train}", f"data.test={test}")
    answer, records = lab.compare(STUDY, *words, output="methods-minilm")
    arms = list(dict.fromkeys(record["arm"] for record in records if record["method"] != "base"))
    full = figure(answer, "accuracy", FULL)["value"]
    share_of = {arm: figure(answer, "accuracy", arm)["value"] / full for arm in arms if arm != FULL}
    rows = [
        [
            arm,
            share(records, arm),
            shown(figure(answer, "accuracy", arm)),
            f"{share_of[arm] - 1:+.1%}" if arm != FULL else "",
            mean_of(records, arm, "peak_mb", "{:,.0f}"),
            mean_of(records, arm, "tokens_per_second", "{:,.0f}"),
        ]
        for arm in arms
    ]
    near = [arm for arm, value in share_of.items() if value >= 1 - WITHIN]
    return Section(
        "The methods on MiniLM and sentence_polarity",
        f"60 steps of 1,024 tokens, every {EVERY}nd official test row; the classifier's new head trains in every arm. "
        "Mean over three seeds with its 95 % interval over seeds and examples.",
        ["arm", "trained", "accuracy", "against full", "peak MB", "rows/s"],
        rows,
        notes=[f"within {WITHIN:.0%} of full's accuracy: {', '.join(near) or 'none'}", f"verdict: {answer['verdict']}"],
    )
