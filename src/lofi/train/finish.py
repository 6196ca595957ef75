"""The end of a run: the trained weights in their folder with what proves them, the figures, the last words.

The adapter is saved with lofi.json (`lofi.files`): hashes of data and tokenizer, the rule of text, labels, figures,
golden prompts. A fully trained model is saved as transformers saves it, in the dtype its base has on disk (float32
masters rounded once), with its tokenizer. `result.json` comes last and makes the run a finished one.
"""

from __future__ import annotations

from typing import Any

from lofi.errors import ProofError
from lofi.files.atomic import atomic_folder, write_json
from lofi.files.lines import read_json_lines
from lofi.recipe import Recipe
from lofi.train.folder import RunFolder
from lofi.train.job import Job
from lofi.train.trainer import LofiTrainer
from lofi.train.verdict import judge

GOLDEN_PROMPTS = 4
GOLDEN_LENGTH = 256  # tokens; longer prompts make replaying slow and prove nothing more


def finish(recipe: Recipe, job: Job, folder: RunFolder, trainer: LofiTrainer, *, seconds: float) -> dict[str, Any]:
    """Save, prove and sum up; the keys are TrainResult's.

    Raises  ProofError when the result changes nothing or does not read back
    """
    rows = read_json_lines(folder.journal)
    verdict = judge(rows)
    metrics = _figures(rows, trainer, seconds)
    lines = [*trainer.proof.lines, verdict.words, *_stopped_early(trainer)]
    job.model.eval()
    if recipe.trains_adapter:
        adapter, model = save_trained_adapter(job, folder, metrics), None
        lines.append(f"adapter: {adapter}")
    else:
        adapter, model = None, save_trained_model(recipe, job, folder, metrics)
        lines.append(f"model: {model}")
    verdict_record = {"best_step": verdict.best_step, "overfitted": verdict.overfitted, "words": verdict.words}
    write_json(folder.result, {"format": 1, "metrics": metrics, "verdict": verdict_record, "lines": lines})
    return {"output": folder.path, "adapter": adapter, "model": model, "metrics": metrics, "lines": lines}


def _figures(rows: list[dict[str, Any]], trainer: LofiTrainer, seconds: float) -> dict[str, Any]:
    """Losses in nats per trained item; `seconds` of this process; parameters that train, and all."""
    from lofi.adapters.registry import trainable_counts

    losses = [row["loss"] for row in rows if "loss" in row]
    checks = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    trainable, parameters = trainable_counts(trainer.model)
    figures: dict[str, Any] = {
        "trainable": trainable,
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "tokens": trainer.books.items,
        "seconds": round(seconds, 2),
    }
    if losses:
        figures |= {"train_loss": losses[-1], "tokens_per_second": sorted(speeds)[len(speeds) // 2]}
    if 0 in checks:
        figures["eval_loss_before"] = checks.pop(0)
    if checks:
        step = min(checks, key=lambda s: (checks[s], s))
        figures |= {"eval_loss": checks[step], "best_step": step}
    return figures


def _stopped_early(trainer: LofiTrainer) -> list[str]:
    from lofi.train.stopping import EarlyStop

    stops = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStop) and c.stopped_at is not None]
    return [f"stopped early at step {s.stopped_at}: {s.patience} evaluations without a better one" for s in stops]


def save_trained_adapter(job: Job, folder: RunFolder, metrics: dict[str, Any]) -> Any:
    """Write `adapter/` with its record."""
    from lofi.files.adapter_folder import save_adapter
    from lofi.files.provenance import hash_tokenizer

    text_format = job.prepared.text_format
    record = {
        "data": job.rows.digests(),
        "task": job.rows.task,
        "tokenizer": hash_tokenizer(job.tokenizer),
        "text_format": text_format.to_dict() if text_format is not None else None,
        "labels": job.prepared.labels,
        "multi_label": job.prepared.multi_label,
        "figures": metrics,
        "golden": _golden(job),
    }
    return save_adapter(job.model, folder.adapter, record=record)


def _golden(job: Job) -> Any:
    """A few prompts of the validation rows (else the training rows) with what the model says to them."""
    from lofi.files.golden import make_golden

    source = job.judged if job.judged is not None else job.prepared
    prompts = [prompt for example in source.examples[:64] if 0 < len(prompt := _prompt(example)) <= GOLDEN_LENGTH]
    rule = job.prepared.text_format
    return make_golden(job.model, prompts[:GOLDEN_PROMPTS] or None, stop_ids=rule.stop_ids if rule is not None else ())


def _prompt(example: Any) -> list[int]:
    """What a model is shown of an example: its prompt, the first half of a text, all of a row that gets a label."""
    ids = example.input_ids
    if example.task != "CAUSAL_LM":
        return ids
    return ids[: example.prompt_length] if example.prompt_length > 1 else ids[: max(1, len(ids) // 2)][:GOLDEN_LENGTH]


def save_trained_model(recipe: Recipe, job: Job, folder: RunFolder, metrics: dict[str, Any]) -> Any:
    """Write `model/`: weights in the base's dtype, config, tokenizer, and lofi.json."""
    import torch

    from lofi.files.tensors import read_safetensors

    dtype = base_dtype(recipe.model, torch.float32)
    model = job.model.to(dtype)
    with atomic_folder(folder.model) as aside:
        model.save_pretrained(aside)
        job.tokenizer.save_pretrained(aside)
        text_format = job.prepared.text_format
        record = {"format": 1, "data": job.rows.digests(), "figures": metrics, "labels": job.prepared.labels}
        write_json(aside / "lofi.json", record | {"text_format": text_format.to_dict() if text_format else None})
        tensors = {k: v for file in sorted(aside.glob("*.safetensors")) for k, v in read_safetensors(file).items()}
        if not tensors:
            raise ProofError(f"{folder.model} holds no weights after saving; check the disk and resume the run")
    return folder.model


def base_dtype(path: str, otherwise: Any) -> Any:
    """The dtype that a model's config says its weights have; `otherwise` where it does not say."""
    from transformers import AutoConfig

    found = getattr(AutoConfig.from_pretrained(path), "dtype", None)
    return found if found is not None else otherwise
