"""LofiTrainer: exact loss, exact resume, checkpoints of safetensors and JSON only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import lofi
from lofi.errors import RequestError
from lofi.models.checkpointing import enable
from lofi.train.checkpoint import is_complete, last_checkpoint
from lofi.train.collate import PadRows
from lofi.train.trainer import LofiTrainer
from quantized_models import quantized
from tiny_training import (
    arguments,
    language_rows,
    tiny_bert,
    tiny_llama,
    tiny_t5,
    trained_tensors,
    with_lora,
)


def labelled_rows(count: int = 21, seed: int = 4, per_token: bool = False) -> list[dict]:
    rows = language_rows(count, seed=seed)
    for i, row in enumerate(rows):
        row["labels"] = [(i + t) % 3 if t else -100 for t in range(len(row["input_ids"]))] if per_token else i % 3
    return rows


def checkpointed(model):
    enable(model)
    return model


CASES = {
    "lora with dropout": (lambda: with_lora(tiny_llama()), language_rows, {}),
    "no accumulation": (lambda: with_lora(tiny_llama()), language_rows, {"gradient_accumulation_steps": 1}),
    "bf16 base": (lambda: with_lora(tiny_llama().to(torch.bfloat16)), language_rows, {}),
    "embedding and head": (
        lambda: with_lora(tiny_llama(tie_word_embeddings=False), target_modules=["embed_tokens", "q_proj", "lm_head"]),
        language_rows,
        {},
    ),
    "all of the weights": (tiny_llama, language_rows, {"learning_rate": 1e-3}),
    "all of the weights under bf16 autocast": (tiny_llama, language_rows, {"learning_rate": 1e-3, "bf16": True}),
    "sequence labels": (lambda: with_lora(tiny_bert(), task_type="SEQ_CLS"), labelled_rows, {}),
    "token labels": (
        lambda: with_lora(tiny_bert("TokenClassification"), task_type="TOKEN_CLS"),
        lambda count=21, seed=4: labelled_rows(count, seed, per_token=True),
        {},
    ),
    "encoder and decoder": (lambda: with_lora(tiny_t5()), language_rows, {}),
    "nf4 base": (lambda: with_lora(quantized(tiny_llama().to(torch.bfloat16), "nf4")), language_rows, {}),
    "int8 base": (lambda: with_lora(quantized(tiny_llama().to(torch.bfloat16), "int8")), language_rows, {}),
    "nf4 base, checkpointed": (lambda: checkpointed(with_lora(quantized(tiny_llama(), "nf4"))), language_rows, {}),
}


def train(folder: Path, case: str, *, resume: str | None = None, **changes) -> LofiTrainer:
    build, rows, settings = CASES[case]
    args = arguments(folder, **({"eval_strategy": "steps", "eval_steps": 3} | settings | changes))
    trainer = LofiTrainer(model=build(), args=args, train_dataset=rows(), eval_dataset=rows(6, seed=9))
    trainer.train(resume)
    return trainer


def losses(trainer: LofiTrainer) -> list[dict]:
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{k: row[k] for k in keys if k in row} for row in trainer.state.log_history if "train_runtime" not in row]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_in_the_same_bits_as_one_that_never_stopped(case, tmp_path):
    whole = train(tmp_path / "whole", case)
    expected = trained_tensors(whole.model)
    for step in (4, 8):  # 4: within the first epoch; 8: within the second, between two logs
        resumed = train(tmp_path / f"from{step}", case, resume=str(tmp_path / "whole" / f"checkpoint-{step}"))
        found = trained_tensors(resumed.model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert losses(resumed) == losses(whole)


def test_a_run_resumed_exactly_at_the_end_of_an_epoch_is_the_same_too(tmp_path):
    whole = train(tmp_path / "whole", "lora with dropout", save_steps=6)  # 23 rows, 4 a step: 6 steps an epoch
    resumed = train(tmp_path / "b", "lora with dropout", resume=str(tmp_path / "whole" / "checkpoint-6"), save_steps=6)
    expected, found = trained_tensors(whole.model), trained_tensors(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_comparison_of_resumed_runs_can_fail(tmp_path):
    whole = train(tmp_path / "whole", "lora with dropout")
    copy = tmp_path / "whole" / "checkpoint-8"
    for name in ("rng.json", "rng.safetensors"):  # without its generators dropout draws other masks
        (copy / name).unlink()
    seal = json.loads((copy / "checkpoint.json").read_text())
    seal["files"] = {k: v for k, v in seal["files"].items() if not k.startswith("rng")}
    (copy / "checkpoint.json").write_text(json.dumps(seal))
    resumed = train(tmp_path / "b", "lora with dropout", resume=str(copy))
    expected, found = trained_tensors(whole.model), trained_tensors(resumed.model)
    assert not all(torch.equal(found[name], expected[name]) for name in expected)


def pickles(folder: Path) -> list[str]:
    """Files that are not JSON text or safetensors, or that begin as a pickle or a zip of pickles does."""
    found = []
    for file in (p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        if file.suffix not in (".json", ".safetensors", ".md", ".jinja") or data[:2] in (
            b"PK",
            b"\x80\x02",
            b"\x80\x04",
        ):
            found.append(str(file.relative_to(folder)))
    return found


@pytest.mark.parametrize("case", ["lora with dropout", "all of the weights"])
def test_no_file_of_a_checkpoint_or_a_saved_model_is_a_pickle(case, tmp_path):
    trainer = train(tmp_path / "run", case)
    assert (tmp_path / "run" / "checkpoint-12" / "optimizer.safetensors").is_file()
    trainer.save_model()
    assert pickles(tmp_path / "run") == []
    torch.save({"a": 1}, tmp_path / "run" / "checkpoint-12" / "optimizer.pt")
    assert pickles(tmp_path / "run") == ["checkpoint-12/optimizer.pt"]  # the search can find one


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path):
    from safetensors.torch import load_file

    trainer = train(tmp_path / "run", "lora with dropout")
    stored = load_file(tmp_path / "run" / "checkpoint-12" / "adapters" / "default.safetensors")
    assert len(stored) == len(trained_tensors(trainer.model))
    assert all(name.endswith(("lora_A", "lora_B")) for name in stored)
    assert not (tmp_path / "run" / "checkpoint-12" / "model.safetensors").exists()


def test_saving_the_model_writes_a_peft_folder_and_leaves_the_checkpoints(tmp_path):
    trainer = train(tmp_path / "run", "lora with dropout")
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert is_complete(tmp_path / "run" / "checkpoint-12")
    other = tiny_llama()
    lofi.load_adapter(other, tmp_path / "run")
    ids = torch.tensor([[3, 9, 27, 41]])
    assert torch.equal(other(ids).logits, trainer.model.eval()(ids).logits)


def test_an_incomplete_checkpoint_is_passed_over_and_the_last_complete_one_is_found(tmp_path):
    train(tmp_path / "run", "lora with dropout")
    run = tmp_path / "run"
    torn = run / "checkpoint-12" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert last_checkpoint(run) == run / "checkpoint-8"
    (run / "checkpoint-8" / "checkpoint.json").unlink()
    assert last_checkpoint(run) == run / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", run / ".checkpoint-99.lofi-new-0")
    assert last_checkpoint(run) == run / "checkpoint-4"


def test_resuming_where_there_is_no_complete_checkpoint_is_refused(tmp_path):
    trainer = LofiTrainer(model=with_lora(tiny_llama()), args=arguments(tmp_path), train_dataset=language_rows())
    with pytest.raises(RequestError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(RequestError, match="not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_model_is_loaded_at_the_end_and_its_checkpoint_is_kept(tmp_path):
    settings = {
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1,
        "load_best_model_at_end": True, "learning_rate": 0.2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    trainer = LofiTrainer(
        model=with_lora(tiny_llama()), args=arguments(tmp_path, **settings),
        train_dataset=language_rows(), eval_dataset=language_rows(6, seed=9),
    )  # fmt: skip
    trainer.train()
    checks = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(checks, key=checks.get)
    assert best != 12  # the rate is far too high, so the last step is not the best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(checks[best], abs=1e-6)
    assert is_complete(tmp_path / f"checkpoint-{best}")


def gradient(rows: list[dict], micro: int, model) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step over all rows, cut into micro-batches of `micro` rows."""
    trainer = LofiTrainer(model=model, args=arguments("unused", save_strategy="no"), train_dataset=rows)
    collate = PadRows()
    batches = [collate(rows[i : i + micro]) for i in range(0, len(rows), micro)]
    samples, items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.model.zero_grad()
    for batch in samples:
        trainer.training_step(trainer.model, batch, items)
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


MODELS = {
    "causal": (lambda: with_lora(tiny_llama(), lora_dropout=0.0), language_rows),
    "encoder-decoder": (lambda: with_lora(tiny_t5(dropout_rate=0.0), lora_dropout=0.0), language_rows),
    "classes": (
        lambda: with_lora(_without_dropout(tiny_bert()), lora_dropout=0.0, task_type="SEQ_CLS"),
        labelled_rows,
    ),
    "tags": (
        lambda: with_lora(_without_dropout(tiny_bert("TokenClassification")), lora_dropout=0.0, task_type="TOKEN_CLS"),
        lambda count: labelled_rows(count, per_token=True),
    ),
    "several classes at once": (
        lambda: with_lora(
            _without_dropout(tiny_bert(problem_type="multi_label_classification")),
            lora_dropout=0.0,
            task_type="SEQ_CLS",
        ),
        lambda count: [row | {"labels": [1.0, 0.0, i % 2.0]} for i, row in enumerate(language_rows(count))],
    ),
}


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_any_cut_of_a_step_into_micro_batches_gives_the_same_gradient(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build, make = MODELS[kind]
    rows = make(11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1)).tolist()
    whole = gradient(rows, 11, build())
    for micro, some in ((1, rows), (4, rows), (3, [rows[i] for i in order])):
        parts = gradient(some, micro, build())
        assert parts.keys() == whole.keys()
        scale = max(float(g.abs().max()) for g in whole.values())
        worst = max(float((parts[n] - whole[n]).abs().max()) for n in whole)
        assert worst <= 1e-6 * max(scale, 1.0)


def test_a_mean_of_batch_means_would_not_pass_that_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = language_rows(11)
    whole, parts = gradient(rows, 11, with_lora(tiny_llama(), lora_dropout=0.0)), {}
    for row in rows:
        for name, grad in gradient([row], 1, with_lora(tiny_llama(), lora_dropout=0.0)).items():
            parts[name] = parts.get(name, 0) + grad / len(rows)
    assert max(float((parts[n] - whole[n]).abs().max()) for n in whole) > 1e-3


def test_a_label_at_the_first_position_of_a_causal_row_is_not_counted(tmp_path):
    trainer = LofiTrainer(model=with_lora(tiny_llama()), args=arguments(tmp_path), train_dataset=language_rows())
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, -100]])}
    _, items = trainer.get_batch_samples(iter([batch, batch]), 2, torch.device("cpu"))
    assert int(items) == 2


@pytest.mark.parametrize("size", [1, 4])
def test_the_validation_loss_is_the_mean_over_tokens_however_rows_are_batched(size, tmp_path):
    model, rows = with_lora(tiny_llama()), language_rows(7, seed=9)
    trainer = LofiTrainer(model=model, args=arguments(tmp_path, per_device_eval_batch_size=size), train_dataset=rows)
    total = tokens = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model.eval()(ids).logits[0, :-1].detach()
        labels = torch.tensor(row["labels"])[1:]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += int((labels != -100).sum())
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_metrics_of_the_user_see_the_logits_of_a_language_model(tmp_path):
    rows = language_rows(4)
    trainer = LofiTrainer(
        model=with_lora(tiny_llama()), args=arguments(tmp_path), train_dataset=rows,
        compute_metrics=lambda p: {"width": p.predictions.shape[-1]},
    )  # fmt: skip
    assert trainer.evaluate(rows)["eval_width"] == 61


def test_weights_of_the_base_that_train_beside_the_adapter_are_refused(tmp_path):
    model = with_lora(tiny_llama())
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(RequestError, match=r"model\.norm\.weight"):
        LofiTrainer(model=model, args=arguments(tmp_path), train_dataset=language_rows())


def test_the_first_line_logged_after_a_resume_is_the_one_of_the_whole_run(tmp_path):
    train(tmp_path / "whole", "lora with dropout")  # logs at 5 and 10, saved at 8: the sums of 6 to 8 are in it
    state = json.loads((tmp_path / "whole" / "checkpoint-8" / "progress.json").read_text())
    assert state["tree"]["last_logged"] == 5


def test_rows_of_unequal_length_are_padded_on_the_right_and_never_trained():
    batch = PadRows(pad_id=7)(
        [{"input_ids": [3, 4], "labels": [-100, 4]}, {"input_ids": [5, 6, 8], "labels": [-100, 6, 8]}]
    )
    assert batch["input_ids"].tolist() == [[3, 4, 7], [5, 6, 8]]
    assert batch["labels"].tolist() == [[-100, 4, -100], [-100, 6, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_publishing_while_training_uploads_no_pickle(tmp_path, monkeypatch):
    import concurrent.futures

    import huggingface_hub

    uploads: list[tuple[str, list[str]]] = []

    class Hub:
        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"me/{name}"})()

        def upload_folder(self, *, folder_path, run_as_future=False, path_in_repo=".", **_):
            assert pickles(Path(folder_path)) == []
            uploads.append((path_in_repo, sorted(p.name for p in Path(folder_path).iterdir())))
            future = concurrent.futures.Future()
            future.set_result(None)
            return future

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    args = arguments(tmp_path / "run", push_to_hub=True, hub_model_id="mine", hub_strategy="checkpoint", save_steps=6)
    LofiTrainer(model=with_lora(tiny_llama()), args=args, train_dataset=language_rows()).train()
    assert [place for place, _ in uploads] == [".", "last-checkpoint"] * 2
    assert "adapter_model.safetensors" in uploads[0][1] and "optimizer.safetensors" in uploads[1][1]
