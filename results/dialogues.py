"""lofi-tiny on DialogSum: ROUGE against three human summaries, base, LoRA, full."""

from __future__ import annotations

from results.lab import Lab, Section, figure, shown

ARMS = (("base", ""), ("LoRA r=16", "dialogsum-lora"), ("full", "dialogsum-full"))


def run(lab: Lab) -> Section:
    model, rows = lab.model("lofi-tiny"), []
    for arm, recipe in ARMS:
        where, who = ["--model", model], "base"
        if recipe:
            _, folder = lab.train(recipe, "--model", model, "--data", lab.data("dialogsum"), output=recipe)
            where, who = lab.subject(model, folder)
        answer = lab.lofi(
            "evaluate", *where, "--data", lab.data("dialogsum", "test"),
            "--columns", "prompt=dialogue,completion=summary", "--metrics", "rouge", "--max-new-tokens", "80",
        )  # fmt: skip
        cells = [shown(figure(answer, metric, who)) for metric in ("rouge1", "rouge2", "rougeL")]
        rows.append([arm, *cells, f"{lab.seconds[recipe] / 60:.1f}" if recipe else ""])
    return Section(
        "lofi-tiny on DialogSum",
        "Summaries of dialogues by a model of 6.5M parameters, 500 test dialogues, best of three human references.",
        ["arm", "ROUGE-1", "ROUGE-2", "ROUGE-L", "minutes of training"],
        rows,
    )
