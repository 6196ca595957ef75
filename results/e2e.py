"""stories260k on E2E: meaning representations to sentences; LoRA beside full fine-tuning and beside random weights."""

from __future__ import annotations

from pathlib import Path

from results.lab import Lab, Section, figure, shown


def run(lab: Lab) -> Section:
    model, data = lab.model("stories260k"), lab.data("e2e_nlg")
    arms = {
        "LoRA r=8, pretrained": ("e2e-lora", model),
        "full, pretrained": ("e2e-full", model),
        "full, random weights of that shape": ("e2e-full", _random_weights(model, lab.work / "stories260k-random")),
    }
    rows = []
    for arm, (recipe, base) in arms.items():
        output = f"{recipe}-{base.name}"
        _, folder = lab.train(recipe, "--model", base, "--data", data, output=output)
        where, who = lab.subject(base, folder)
        loss = lab.lofi("evaluate", *where, "--data", lab.data("e2e_nlg", "validation"), "--metrics", "loss")
        text = lab.lofi("evaluate", *where, "--data", lab.data("e2e_nlg", "test"), "--metrics", "bleu,rouge")
        rows.append(
            [
                arm,
                shown(figure(loss, "loss", who)),
                shown(figure(text, "bleu", who), 1),
                shown(figure(text, "rougeL", who)),
                f"{lab.seconds[output] / 60:.1f}",
            ]
        )
    return Section(
        "stories260k on E2E NLG, one epoch",
        "Meaning representation to sentence; 12,000 training rows, official test set (630 inputs), all human "
        "references, greedy decoding. BLEU by sacrebleu, ROUGE-L F1 by lofi (best reference).",
        ["arm", "validation loss", "BLEU", "ROUGE-L", "minutes of training"],
        rows,
    )


def _random_weights(model: Path, target: Path) -> Path:
    """The same shape with weights as transformers initialises them, seed 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target
