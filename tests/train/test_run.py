"""The whole road: a recipe in, a run folder out; refusals before anything is written; stopping and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import lofi
from lofi.errors import DataError, Interrupted, LofiError, LofiWarning, NonFiniteError, ProofError, RecipeError
from lofi.recipe import make_recipe
from lofi.train.run import train
from tiny_training import tiny_bert, tiny_t5

REPOSITORY = Path(__file__).resolve().parents[2]
ANIMALS = ("cat", "dog", "bird", "horse", "fox", "mouse", "fish")


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"What is {i}?", "completion": f"a {ANIMALS[i % 7]}" + " runs" * (i % 3)}
        for i in range(start, start + count)
    ]


def recipe(folder: Path, model: Path, rows: list[dict] | None = None, checks: list[dict] | None = None, **changes):
    """A recipe of a short run on few rows; `changes` are dotted keys with '.' written as '__'."""
    data = {"train": write_rows(folder / "train.jsonl", rows or pairs(14))}
    if checks != []:
        data["validation"] = write_rows(folder / "validation.jsonl", checks or pairs(4, 50))
    values = {
        "model": str(model),
        "data": data,
        "lora": {"r": 3, "lora_alpha": 7},
        "train": {"epochs": 2, "batch_tokens": 128, "save_steps": 2, "logging_steps": 1, "dtype": "fp32"},
        "output": str(folder / "run"),
    }
    return make_recipe(values, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A random two-layer Llama with lofi-tiny's tokenizer: the whole road in a second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    _copy_tokenizer(folder)
    return folder


def _copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((REPOSITORY / "src/lofi/assets/lofi-tiny" / name).read_bytes())


def saved(model, folder: Path) -> Path:
    """A tiny model with lofi-tiny's tokenizer beside it."""
    model.resize_token_embeddings(8192)
    model.save_pretrained(folder)
    _copy_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """One finished run: (recipe, result)."""
    asked = recipe(tmp_path_factory.mktemp("finished"), small)
    return asked, train(asked, progress=False)


def test_a_run_folder_holds_what_the_design_says(finished):
    _, result = finished
    names = {p.name for p in result.output.iterdir()}
    assert names == {"recipe.yaml", "chosen.json", "metrics.jsonl", "result.json", "adapter", "checkpoints"}
    assert result.adapter == result.output / "adapter"


def test_the_adapter_learned_and_loads_on_the_base(finished, small):
    _, result = finished
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    model = lofi.load_model(small)
    read = lofi.load_adapter(model, result.adapter)
    assert read.record["text_format"]["kind"] == "chat"
    assert read.record["figures"]["best_step"] == result.metrics["best_step"]
    assert len(read.record["data"]) == 2


def test_the_golden_prompts_of_the_adapter_can_be_replayed(finished, small):
    from lofi.files.golden import replay

    _, result = finished
    model = lofi.load_model(small)
    golden = lofi.load_adapter(model, result.adapter).record["golden"]
    assert len(golden["prompts"]) == 4
    assert replay(model, golden) == []
    with lofi.adapters_off(model):
        assert replay(model, golden)  # the base says something else


def test_every_automatic_choice_is_said_with_its_reason_and_stored(finished):
    _, result = finished
    stored = json.loads((result.output / "chosen.json").read_text())["choices"]
    assert set(stored["why"]) >= {"device", "dtype", "micro_tokens", "packing"}
    assert any(line.startswith("packing: True (") for line in result.lines)
    assert any("EOS trained in 14/14" in line for line in result.lines)
    assert any("trained tensors moved" in line for line in result.lines)


def test_the_journal_has_every_step_once_and_the_base_before_it(finished):
    _, result = finished
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, result.metrics["steps"] + 1))
    assert rows[0]["step"] == 0 and "eval_loss" in rows[0]
    assert all(row["tokens"] > 0 for row in rows if "loss" in row)


def test_a_finished_run_is_left_alone_and_said_to_be_finished(finished):
    asked, result = finished
    again = train(asked, resume=True, progress=False)
    assert again.already_finished and again.metrics == result.metrics and again.adapter == result.adapter
    with pytest.raises(RecipeError, match="holds a finished run"):
        train(asked, progress=False)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(finished, small, tmp_path):
    _, first = finished
    folders = {}
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        asked = recipe(tmp_path / str(seed), small, train__seed=seed)
        folders[seed] = (train(asked, progress=False).adapter / "adapter_model.safetensors").read_bytes()
    assert folders[0] == (first.adapter / "adapter_model.safetensors").read_bytes()
    assert folders[1] != folders[0]


def test_a_run_interrupted_by_ctrl_c_is_saved_and_goes_on_to_the_same_bits(finished, small, tmp_path):
    _, whole = finished
    asked = recipe(tmp_path, small)
    journal = tmp_path / "run" / "metrics.jsonl"
    third = _ctrl_c_when(lambda: journal.is_file() and '"step": 3,' in journal.read_text())
    with third, pytest.raises(Interrupted, match="--resume") as stopped:
        train(asked, progress=False)
    assert stopped.value.exit_code == 130
    resumed = train(asked, resume=True, progress=False)
    assert resumed.resumed
    for name in ("adapter/adapter_model.safetensors",):
        assert (resumed.output / name).read_bytes() == (whole.output / name).read_bytes()
    figures = [_timeless(run.output / "metrics.jsonl") for run in (resumed, whole)]
    assert figures[0] == figures[1]


def _timeless(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


class _ctrl_c_when:
    """Send this process SIGINT once a condition holds."""

    def __init__(self, condition) -> None:
        self.condition, self.done = condition, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.0005):
            if self.condition():
                os.kill(os.getpid(), signal.SIGINT)
                return

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()


def test_a_run_killed_three_times_ends_in_the_bits_of_one_that_was_not(small, tmp_path):
    asked = recipe(tmp_path, small)
    (tmp_path / "recipe.yaml").write_text(asked.resolved_yaml(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "bench/kill_resume.py"), str(tmp_path / "recipe.yaml"),
         "--folder", str(tmp_path / "runs"), "--kills", "3", "--seed", "4"],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == 3 and told["same_bits"] and told["same_metrics"]


def test_a_run_that_stopped_is_not_started_over_by_accident(small, tmp_path):
    asked = recipe(tmp_path, small)
    journal = tmp_path / "run" / "metrics.jsonl"
    with _ctrl_c_when(lambda: journal.is_file() and '"step": 2,' in journal.read_text()), pytest.raises(Interrupted):
        train(asked, progress=False)
    with pytest.raises(RecipeError, match="add --resume"):
        train(asked, progress=False)
    other = recipe(tmp_path, small, train__epochs=3)
    with pytest.raises(RecipeError, match=r"train\.epochs was 2\.0, is now 3"):
        train(other, resume=True, progress=False)
    write_rows(tmp_path / "train.jsonl", pairs(14)[::-1])
    with pytest.raises(RecipeError, match=r"train\.jsonl changed since"):
        train(asked, resume=True, progress=False)


def test_resuming_what_never_began_starts_and_says_so(small, tmp_path):
    result = train(recipe(tmp_path, small, train__max_steps=2, train__epochs="null"), resume=True, progress=False)
    assert "nothing to resume" in result.lines[0] and not result.resumed


def test_a_folder_with_other_files_is_never_written_into(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="no run of lofi"):
        train(recipe(tmp_path, small), progress=False)


def test_a_refused_request_leaves_no_folder_behind(small, tmp_path):
    asked = recipe(tmp_path, small, rows=[{"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match=r"train\.jsonl:1"):
        train(asked, progress=False)
    with pytest.raises(RecipeError, match="early_stopping needs validation rows"):
        train(recipe(tmp_path, small, checks=[], train__early_stopping=2), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_rate_that_blows_up_stops_the_run_and_names_tensor_and_rows(small, tmp_path):
    asked = recipe(tmp_path, small, train__learning_rate=1e30, train__warmup_steps=0, train__max_grad_norm=0)
    with pytest.raises(
        NonFiniteError, match=r"model\.layers\.0\S+ is not a finite number at step 2 on \S*train\.jsonl:\d+"
    ):
        train(asked, progress=False)
    dumped = json.loads((tmp_path / "run" / "checkpoints" / "nonfinite.json").read_text())
    assert dumped["rows"] and dumped["inputs"]["input_ids"]


def test_early_stopping_stops_and_the_best_step_is_the_one_that_is_kept(small, tmp_path):
    asked = recipe(
        tmp_path, small, train__epochs=30, train__early_stopping=2, train__learning_rate=0.05, train__warmup_steps=0
    )
    result = train(asked, progress=False)
    checks = {r["step"]: r["eval_loss"] for r in _timeless(result.output / "metrics.jsonl") if "eval_loss" in r}
    del checks[0]
    assert result.metrics["steps"] == max(checks) < 30 * 3
    assert result.metrics["best_step"] == min(checks, key=checks.get)
    assert any("stopped early" in line for line in result.lines)


def test_full_fine_tuning_leaves_a_model_folder_in_the_dtype_of_its_base(small, tmp_path):
    result = train(recipe(tmp_path, small, method="full", train__learning_rate=1e-3), progress=False)
    assert result.adapter is None and result.model == tmp_path / "run" / "model"
    model = lofi.load_model(result.model)
    assert next(model.parameters()).dtype == lofi.load_model(small).dtype
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


def test_an_encoder_decoder_learns_pairs(tmp_path):
    model = saved(tiny_t5(), tmp_path / "t5")
    result = train(recipe(tmp_path, model, train__learning_rate=0.01), progress=False)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


def test_plain_text_and_rows_at_a_time(small, tmp_path):
    rows = [{"text": row["prompt"] + row["completion"]} for row in pairs(9)]
    asked = recipe(
        tmp_path, small, rows=rows, checks=[], train__micro_batch_size=2, train__gradient_accumulation_steps=2,
        train__batch_tokens="null",
    )  # fmt: skip
    result = train(asked, progress=False)
    assert result.metrics["steps"] == 2 * 3  # 9 rows: 5 micro-batches of 2 rows, 3 steps an epoch


def test_classes_are_learned_with_their_names_kept(tmp_path):
    rows = [{"text": f"the {a} of {i}", "label": "animal" if i % 2 else "thing"} for i, a in enumerate(ANIMALS * 2)]
    model = saved(tiny_bert("MaskedLM"), tmp_path / "bert")
    result = train(recipe(tmp_path, model, rows=rows, checks=rows[:4]), progress=False)
    record = json.loads((result.adapter / "lofi.json").read_text())
    assert record["labels"] == ["animal", "thing"] and record["task"] == "classification"
    assert any("classifier" in line for line in result.lines if line.startswith("new"))


def test_tags_are_learned_and_multi_label_rows_too(tmp_path):
    model = saved(tiny_bert("MaskedLM"), tmp_path / "bert")
    tags = [{"tokens": ["a", word, "runs"], "tags": ["O", "B-X", "O"]} for word in ANIMALS]
    several = [{"text": word, "labels": ["x", "y"] if i % 2 else ["y"]} for i, word in enumerate(ANIMALS)]
    for name, rows in (("tags", tags), ("several", several)):
        (tmp_path / name).mkdir()
        result = train(recipe(tmp_path / name, model, rows=rows, checks=[]), progress=False)
        assert result.metrics["steps"] > 0


def test_gradient_checkpointing_gives_the_same_adapter(finished, small, tmp_path):
    _, plain = finished
    result = train(recipe(tmp_path, small, train__gradient_checkpointing="true"), progress=False)
    assert result.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=1e-5)


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(small, tmp_path, monkeypatch):
    import errno

    from lofi.train import checkpoint

    asked = recipe(tmp_path, small)
    real, calls = checkpoint.write_weights, []

    def full(model, folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(model, folder)

    monkeypatch.setattr(checkpoint, "write_weights", full)
    with pytest.raises(LofiError, match="the disk is full"):
        train(asked, progress=False)
    monkeypatch.undo()
    assert train(asked, resume=True, progress=False).resumed


def test_an_adapter_that_learned_nothing_is_not_saved(small, tmp_path):
    asked = recipe(tmp_path, small, train__max_steps=1, train__epochs="null", train__warmup_steps=1, checks=[])
    with pytest.raises(ProofError, match="changes nothing"):
        train(asked, progress=False)  # its only step is the warm-up's first, whose rate is zero
    assert not (tmp_path / "run" / "adapter").exists()


def test_tensorboard_events_are_written_where_it_is_installed(small, tmp_path):
    pytest.importorskip("tensorboard")
    asked = recipe(tmp_path, small, train__report_to="tensorboard", train__max_steps=2, train__epochs="null")
    train(asked, progress=False)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(("method", "kind"), [("qlora", "nf4"), ("int8-lora", "int8")])
def test_a_run_over_a_quantized_base_learns_and_says_on_what(method, kind, small, tmp_path):
    from lofi.files.golden import replay

    asked = recipe(tmp_path, small, method=method, train__gradient_checkpointing="true")
    result = train(asked, progress=False)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert f"quantization: {kind} (method {method})" in result.lines
    assert any(line.startswith(kind) and "14 weights with" in line for line in result.lines)
    assert any(line.startswith("trainable params") and "all params: 20" in line for line in result.lines)  # logical
    model = lofi.load_model(small, quantization=kind, dtype="fp32")
    record = lofi.load_adapter(model, result.adapter).record
    assert record["base"]["quantization"] == kind and replay(model, record["golden"]) == []
    dense = lofi.load_model(small)
    with pytest.warns(LofiWarning, match=f"trained on an {kind} base and is loaded on a dense base"):
        lofi.load_adapter(dense, result.adapter)


def test_method_lora_with_a_quantization_is_the_same_run_said_otherwise(small, tmp_path):
    made = []
    for name, changes in (("a", {"method": "qlora"}), ("b", {"method": "lora", "quantization": "nf4"})):
        (tmp_path / name).mkdir()
        result = train(recipe(tmp_path / name, small, checks=[], **changes), progress=False)
        made.append((result.adapter / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("method", ["qlora", "int8-lora"])
def test_a_run_over_a_quantized_base_resumes_to_the_same_bits(method, small, tmp_path):
    folders = tmp_path / "whole", tmp_path / "stopped"
    for folder in folders:
        folder.mkdir()
    changes = {"method": method, "lora__lora_dropout": 0.2, "train__dtype": "bf16"}
    whole = train(recipe(folders[0], small, **changes), progress=False)
    asked = recipe(folders[1], small, **changes)
    journal = folders[1] / "run" / "metrics.jsonl"
    third = _ctrl_c_when(lambda: journal.is_file() and '"step": 3,' in journal.read_text())
    with third, pytest.raises(Interrupted, match="--resume"):
        train(asked, progress=False)
    resumed = train(asked, resume=True, progress=False)
    assert resumed.resumed
    tensors = [run.output / "adapter/adapter_model.safetensors" for run in (whole, resumed)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
    assert _timeless(whole.output / "metrics.jsonl") == _timeless(resumed.output / "metrics.jsonl")


def test_a_folder_that_is_quantized_already_trains_as_it_is_and_not_in_full(small, tmp_path):
    packed = tmp_path / "packed"
    lofi.load_model(small, quantization="nf4").save_pretrained(packed)
    _copy_tokenizer(packed)
    result = train(recipe(tmp_path, packed, checks=[]), progress=False)
    assert "quantization: nf4 (as the model folder is written)" in result.lines
    assert lofi.load_adapter(lofi.load_model(packed), result.adapter).record["base"]["quantization"] == "nf4"
    (tmp_path / "other").mkdir()
    for method, words in (("full", "which cannot train"), ("int8-lora", "use method qlora")):
        with pytest.raises(RecipeError, match=words):
            train(recipe(tmp_path / "other", packed, method=method), progress=False)
    assert not (tmp_path / "other" / "run").exists()


def test_a_base_that_was_quantized_since_is_no_base_to_resume_on(small, tmp_path):
    base = tmp_path / "base"
    lofi.load_model(small).save_pretrained(base)
    _copy_tokenizer(base)
    asked = recipe(tmp_path, base)
    journal = tmp_path / "run" / "metrics.jsonl"
    with _ctrl_c_when(lambda: journal.is_file() and '"step": 2,' in journal.read_text()), pytest.raises(Interrupted):
        train(asked, progress=False)
    packed = lofi.load_model(base, quantization="nf4")
    (base / "model.safetensors").unlink()
    packed.save_pretrained(base)
    with pytest.raises(RecipeError, match="an nf4 base against a dense base"):
        train(asked, resume=True, progress=False)
