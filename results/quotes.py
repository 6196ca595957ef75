"""lofi-tiny on English quotes: perplexity of plain text, base, LoRA, full."""

from __future__ import annotations

from results.lab import Lab, Section, figure, shown

ARMS = (("base", ""), ("LoRA r=16", "quotes-lora"), ("full", "quotes-full"))


def run(lab: Lab) -> Section:
    model, rows = lab.model("lofi-tiny"), []
    for arm, recipe in ARMS:
        where, who = ["--model", model], "base"
        if recipe:
            _, folder = lab.train(recipe, "--model", model, "--data", lab.data("english_quotes"), output=recipe)
            where, who = lab.subject(model, folder)
        answer = lab.lofi(
            "evaluate", *where, "--data", lab.data("english_quotes", "test"), "--columns", "text=quote",
            "--metrics", "perplexity",
        )  # fmt: skip
        cell = shown(figure(answer, "perplexity", who), 1)
        rows.append([arm, cell, f"{lab.seconds[recipe] / 60:.1f}" if recipe else ""])
    return Section(
        "lofi-tiny on english_quotes",
        "Token-weighted perplexity of 250 test quotes (a lower-cased collection), trained on 1,969 quotes as text.",
        ["arm", "perplexity", "minutes of training"],
        rows,
    )
