"""lofi-tiny puts the marks back on Vietnamese: base, LoRA and full fine-tuning, three seeds."""

from __future__ import annotations

import statistics

from results.lab import Lab, Section, figure

SEEDS = (0, 1, 2)


def run(lab: Lab) -> Section:
    model, test = lab.model("lofi-tiny"), lab.data("vi_diacritics", "test")
    metrics = ("--data", test, "--metrics", "syllable_accuracy,rouge")
    base = lab.lofi("evaluate", "--model", model, *metrics)
    rows = [_row("base", [base], "base", "")]
    for arm, recipe in (("LoRA r=16", "diacritics-lora"), ("full", "diacritics-full")):
        answers, seconds = [], []
        for seed in SEEDS:
            output = f"{recipe}-{seed}"
            words = ("--model", model, "--data", lab.data("vi_diacritics"), "--seed", str(seed))
            _, folder = lab.train(recipe, *words, output=output)
            seconds.append(lab.seconds[output])
            where, who = lab.subject(model, folder)
            answers.append(lab.lofi("evaluate", *where, *metrics))
        rows.append(_row(arm, answers, who, f"{statistics.mean(seconds) / 60:.1f}"))
    return Section(
        "lofi-tiny on vi_diacritics",
        "Vietnamese with its marks removed, to the real sentence; official test rows (529), greedy decoding. Mean over "
        "three seeds, each seed's value in brackets. ROUGE-L in Unicode mode: `má` and `mạ` are different syllables.",
        ["arm", "syllable accuracy", "ROUGE-L", "minutes of training"],
        rows,
    )


def _row(arm: str, answers: list[dict], who: str, minutes: str) -> list[str]:
    return [
        arm,
        *(_mean([figure(a, m, who)["value"] for a in answers]) for m in ("syllable_accuracy", "rougeL")),
        minutes,
    ]


def _mean(values: list[float]) -> str:
    each = f" [{', '.join(f'{v:.3f}' for v in values)}]" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{each}"
