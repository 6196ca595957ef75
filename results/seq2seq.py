"""A small T5 on DialogSum: taught to summarise from nothing, then a second style by LoRA and by full training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from results.lab import Lab, Section, figure, shown

SIZES = {"train": 12000, "validation": 40, "test": 150}
CHARACTERS = {"dialogue": 700, "summary": 160}  # at most: the short half of the dialogues
METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
FIRST = ("train.max_steps=450", "train.batch_tokens=2048", "train.learning_rate=3e-3", "train.save_steps=450")
SECOND = ("train.max_steps=120", "train.batch_tokens=2048", "train.save_steps=120")
SAME = ("train.epochs=null", "train.max_length=224", "train.eval_steps=150", "data.columns=null", "train.dtype=fp32")
ARMS = (
    ("LoRA r=16, q and v", "summaries-t5-lora", ("lora.r=16", "lora.lora_alpha=32", "lora.lora_dropout=0")),
    ("full", "summaries-t5-full", ()),
)
RATES = {"summaries-t5-lora": "train.learning_rate=1e-2", "summaries-t5-full": "train.learning_rate=2e-3"}


def run(lab: Lab) -> Section:
    folder = lab.work / "seq2seq-data"
    plain, second = (write(lab, folder / name, style) for name, style in (("plain", _plain), ("second", _second)))
    base = teach(lab, plain)
    rows = [["base", *judged(lab, second, "--model", base), ""]]
    for arm, recipe, words in ARMS:
        output = f"seq2seq-{recipe}"
        more = ("--model", base, "--data", second, *SECOND, *SAME, *words, RATES[recipe])
        _, run_folder = lab.train(recipe, *more, output=output)
        where, who = lab.subject(base, run_folder)
        rows.append([arm, *judged(lab, second, *where, who=who), f"{lab.seconds[output] / 60:.1f}"])
    return Section(
        "A small T5 learns a second style of summary",
        "T5 1.1 of 1.8M parameters from random weights, taught DialogSum's summaries by full training, then the same "
        "summaries in another style (the topic first, speakers in words) by LoRA and by full training; "
        f"dialogues of at most {CHARACTERS['dialogue']} characters, {SIZES['test']} test rows, one reference each.",
        ["arm", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum", "minutes of training"],
        rows,
        notes=[
            "No pretrained encoder-decoder stands behind this, and it saw a few thousand dialogues once: the figures "
            "show the road (training, generation, ROUGE, both methods on one base), not the quality of summaries. "
            "examples/studies/summaries.yaml is the comparison on FLAN-T5.",
            f"Teaching the base took {lab.seconds['seq2seq-base'] / 60:.1f} minutes.",
        ],
    )


def write(lab: Lab, folder: Path, style: Any) -> Path:
    """DialogSum's rows with their summaries in one style, as prompt and completion."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in SIZES.items():
        with lab.data("dialogsum", split).open(encoding="utf-8") as read:
            made = list(_pairs(map(json.loads, read), style))[:most]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def _pairs(rows: Iterable[dict[str, Any]], style: Any) -> Iterator[dict[str, str]]:
    for row in rows:
        row |= {key: _first(row[key]) for key in ("summary", "topic")}
        if any(len(row[key]) > most for key, most in CHARACTERS.items()):
            continue
        yield {"prompt": row["dialogue"], "completion": style(row["summary"], row["topic"])}


def _first(value: Any) -> str:
    return value[0] if isinstance(value, list) else value


def _plain(summary: str, topic: str) -> str:
    return summary


def _second(summary: str, topic: str) -> str:
    """The topic, then the summary with its speakers in words."""
    for number, word in (("1", "first"), ("2", "second"), ("3", "third")):
        summary = summary.replace(f"#Person{number}#", f"the {word} speaker")
    return f"About {topic}: {summary}"


def teach(lab: Lab, data: Path) -> Path:
    """A T5 with lofi-tiny's tokenizer, trained in full from random weights."""
    _, folder = lab.train(
        "summaries-t5-full", "--model", random_t5(lab), "--data", data, *FIRST, *SAME, output="seq2seq-base"
    )
    return folder / "model"


def random_t5(lab: Lab) -> Path:
    """A T5 1.1 of two layers a side with random weights, as a folder."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = lab.work / "seq2seq-random"
    tokenizer = AutoTokenizer.from_pretrained(lab.model("lofi-tiny"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=8192, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def judged(lab: Lab, data: Path, *where: str | Path, who: str = "base") -> list[str]:
    """The ROUGE figures of one speaker on the test rows."""
    words = ("--data", data, "--split", "test", "--metrics", "rouge", "--max-new-tokens", "64")
    answer = lab.lofi("evaluate", *where, *words)
    return [shown(figure(answer, metric, who)) for metric in METRICS]
