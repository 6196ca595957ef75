"""Encoder-decoders through the doors of every verb: a T5 that can summarise learns a second style of summary."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import lofi
import tiny_t5
from lofi.cli.main import main
from lofi.data.format import TextFormat
from lofi.errors import DataError, TargetError
from lofi.evaluate.generation import generate
from lofi.files.golden import make_golden
from lofi.models.checkpointing import enable
from lofi.models.loss import LanguageModelLoss
from lofi.recipe import make_recipe
from lofi.train.run import train

STYLE = re.compile(r"(\w+) lost by (\w+) and found by (\w+) at the (\w+) \.")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A T5 taught the plain summaries with torch alone, as a folder."""
    model = tiny_t5.t5()
    assert tiny_t5.teach(model, steps=110, rate=1e-2) < 0.3
    return tiny_t5.saved(model, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count, seed in (("train", 150, 2), ("validation", 12, 3), ("test", 20, 4)):
        tiny_t5.write_rows(folder / f"{split}.jsonl", tiny_t5.rows(count, seed))
    return folder


def recipe(base: Path, data: Path, output: Path, *words: str):
    values = {
        "model": str(base),
        "data": {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl")},
        "lora": {"r": 3, "lora_alpha": 7},
        "train": {"epochs": 3, "batch_tokens": 512, "learning_rate": 2e-2, "dtype": "fp32", "logging_steps": 1},
        "output": str(output),
    }
    return make_recipe(values, words)


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """One LoRA run over all linears."""
    asked = recipe(base, data, tmp_path_factory.mktemp("run") / "lora", "train.save_steps=7")
    return asked, train(asked, progress=False)


def ask(capsys, *words) -> dict:
    """The JSON answer of one verb."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_answers_are_better_by_rouge_and_end_by_themselves(finished, base, data, capsys):
    _, result = finished
    found = ask(capsys, "evaluate", "--model", base, "--adapter", f"second={result.output}", "--data", data,
                "--metrics", "rouge,stop_rate,perplexity")  # fmt: skip
    figures = {(row["who"], row["metric"]): row["value"] for row in found["results"]}
    for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert figures["second", kind] > figures["base", kind] + 0.3, kind
    assert figures["second", "stop_rate"] == figures["base", "stop_rate"] == 1.0
    assert figures["second", "perplexity"] < figures["base", "perplexity"] / 10
    assert all(row["p"] < 0.05 for row in found["comparison"] if row["metric"].startswith("rouge"))


def test_the_base_keeps_its_own_style_and_the_adapter_speaks_the_other(finished, base, data, capsys):
    _, result = finished
    prompt = json.loads((data / "test.jsonl").read_text().splitlines()[0])["prompt"]
    plain = ask(capsys, "generate", "--model", base, "--prompt", prompt)["answers"]
    second = ask(capsys, "generate", "--model", base, "--adapter", result.output, "--prompt", prompt)["answers"]
    assert " asks " in plain[0]["text"] and plain[0]["stopped"] and second[0]["stopped"]
    assert STYLE.fullmatch(second[0]["text"]) and not STYLE.fullmatch(plain[0]["text"])


def test_the_golden_prompts_are_replayed(finished, capsys):
    _, result = finished
    assert ask(capsys, "verify", result.output) == {"adapter": str(result.adapter), "same": True, "prompts": 4}


def test_merged_it_says_the_same_from_files_of_its_own(finished, base, data, tmp_path, capsys):
    _, result = finished
    words = ("--model", base, "--adapter", result.output, "--data", data / "test.jsonl")
    told = ask(capsys, "merge", *words, "--output", tmp_path / "merged", "--min-kept", "0.99")
    figures = {row["metric"]: row["value"] for row in told["results"] if row["who"] == "merged"}
    assert figures["max_logit_error"] < 1e-4 < figures["adapter_effect"] and figures["top1_agreement"] == 1.0
    prompt = json.loads((data / "test.jsonl").read_text().splitlines()[1])["prompt"]
    merged = ask(capsys, "generate", "--model", tmp_path / "merged", "--prompt", prompt)["answers"][0]["text"]
    unmerged = ask(capsys, "generate", *words[:4], "--prompt", prompt)["answers"][0]["text"]
    assert merged == unmerged and STYLE.fullmatch(merged)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_into_fewer_bits_it_keeps_the_gain(finished, base, data, tmp_path, kind, capsys):
    _, result = finished
    told = ask(capsys, "merge", "--model", base, "--adapter", result.output, "--data", data / "test.jsonl",
               "--output", tmp_path / kind, "--into", kind, "--rounding", "nearest", "--min-kept", "0.9")  # fmt: skip
    assert told["into"] == kind and (tmp_path / kind / "model.safetensors").is_file()


def test_a_stopped_run_goes_on_to_the_same_bits(finished, base, data, tmp_path, monkeypatch):
    from lofi.errors import NonFiniteError
    from lofi.train.trainer import LofiTrainer

    _, whole = finished
    real, steps = LofiTrainer.training_step, []

    def stopping(self, *args, **kwargs):
        steps.append(None)
        if len(steps) == 12:
            raise NonFiniteError("stopped by the test")
        return real(self, *args, **kwargs)

    asked = recipe(base, data, tmp_path / "run", "train.save_steps=7")
    monkeypatch.setattr(LofiTrainer, "training_step", stopping)
    with pytest.raises(NonFiniteError, match="stopped by the test"):
        train(asked, progress=False)
    monkeypatch.setattr(LofiTrainer, "training_step", real)
    resumed = train(asked, resume=True, progress=False)
    assert resumed.resumed
    first, second = (lofi.files.adapter_folder.read_folder(one.adapter).tensors for one in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


METHODS = {
    "LoRA of q and v": ["lora.target_modules=[q,v]"],
    "LoRA on gated layers": [],
    "qlora": ["method=qlora"],
    "int8-lora": ["method=int8-lora"],
    "bf16": ["train.dtype=bf16", "train.epochs=1"],
    "houlsby": ["method=houlsby", "houlsby.bottleneck_size=7"],
    "adapter-lin": ["method=adapter-lin", "adapter_lin.bottleneck_size=7", "train.learning_rate=0.01"],
    "prefix": ["method=prefix", "prefix.num_virtual_tokens=5", "train.learning_rate=0.1"],
    "prompt": ["method=prompt", "prompt.num_virtual_tokens=5", "train.learning_rate=0.1"],
    "last layers": ["method=last-layers", "train.learning_rate=0.01"],
    "lora+prefix": ["method=lora+prefix", "prefix.num_virtual_tokens=5", "train.epochs=1"],
}
FEW = ("prefix", "prompt")  # parameters: five virtual tokens move a loss less


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_the_loss_on_validation_rows(name, base, data, tmp_path):
    model = tiny_t5.saved(tiny_t5.t5(gated=True, tied=False), tmp_path / "gated") if "gated" in name else base
    result = train(recipe(model, data, tmp_path / "run", *METHODS[name]), progress=False)
    assert result.metrics["eval_loss"] < (0.95 if name in FEW else 0.6) * result.metrics["eval_loss_before"]


@pytest.mark.parametrize("method", ["houlsby", "prefix", "prompt", "lora+prefix", "last-layers"])
def test_answers_with_a_cache_are_those_without(method, base):
    """Golden prompts are answered by whole forwards; `generate` keeps keys and values."""
    model, words = lofi.load_model(base), tiny_t5.tokenizer()
    config = recipe(base, base, base, f"method={method}").adapter_config()
    torch.manual_seed(2)
    lofi.add_adapter(model, config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    prompts = [words(row["prompt"])["input_ids"] for row in tiny_t5.rows(4, 6)]
    golden = make_golden(model, prompts, stop_ids=[1])
    rule = TextFormat.for_tokenizer(words, seq2seq=True)
    found = generate(model, words, rule, prompts, max_new_tokens=16)
    for record, answer in zip(golden["prompts"], found, strict=True):
        assert answer.ids == [token for token in record["output"] if token != 1]
        assert answer.stopped == record["stopped"]
    with lofi.adapters_off(model):
        assert make_golden(model, prompts, stop_ids=[1])["prompts"] != golden["prompts"]


def test_bitfit_trains_barts_biases_and_is_refused_on_t5_which_has_none(base, data, tmp_path):
    with pytest.raises(TargetError, match="BitFit trains biases, but this T5ForConditionalGeneration has none"):
        train(recipe(base, data, tmp_path / "t5", "method=bitfit"), progress=False)
    model = tiny_t5.saved(tiny_t5.bart(), tmp_path / "bart")
    result = train(recipe(model, data, tmp_path / "run", "method=bitfit", "train.epochs=1"), progress=False)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


def test_a_fully_trained_model_is_evaluated_as_any_other(base, data, tmp_path, capsys):
    words = ("method=full", "train.learning_rate=0.01")
    result = train(recipe(base, data, tmp_path / "run", *words), progress=False)
    found = ask(capsys, "evaluate", "--model", result.model, "--data", data, "--metrics", "rougeL")
    assert found["results"][0]["value"] > 0.6


def test_bart_learns_too(data, tmp_path, capsys):
    model = tiny_t5.saved(tiny_t5.bart(), tmp_path / "bart")
    result = train(recipe(model, data, tmp_path / "run", "train.learning_rate=0.005", "train.epochs=2"), progress=False)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert ask(capsys, "verify", result.output)["same"]


def batch(count: int = 5) -> dict[str, torch.Tensor]:
    """Rows of unequal length on both sides."""
    words, rows = tiny_t5.tokenizer(), tiny_t5.rows(count, 1, "plain")
    rows[0]["completion"] = "bob asks ."
    read, said = (words([row[side] for row in rows], return_tensors="pt", padding=True) for side in rows[0])
    labels = said.input_ids.masked_fill(said.attention_mask == 0, -100)
    return {"input_ids": read.input_ids, "attention_mask": read.attention_mask, "labels": labels}


@pytest.mark.parametrize("family", [tiny_t5.t5, tiny_t5.bart])
def test_the_loss_is_the_exact_sum_over_target_tokens(family):
    model, inputs = family(), batch()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 8)  # losses that differ between tokens
    found = LanguageModelLoss(model)(model, inputs)
    labels = inputs["labels"]
    start = torch.full((len(labels), 1), model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, model.config.pad_token_id)], dim=1)
    rest = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = found._replace(loss_sum=found.loss_sum.detach())
        chances = model(**rest, decoder_input_ids=shifted).logits.double().log_softmax(-1)  # (N, T, V)
    kept = labels != -100
    by_hand = -chances.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].sum()
    assert found.tokens == int(kept.sum()) and (~kept).any() and (labels[0] == 1).sum() == 1
    assert float(found.loss_sum) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("family", [tiny_t5.t5, tiny_t5.bart])
def test_gradients_are_the_same_with_checkpointing(family):
    found = []
    for checkpointed in (False, True):
        model = family()
        torch.manual_seed(3)
        lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        if checkpointed:
            enable(model)
        LanguageModelLoss(model)(model.train(), batch()).loss_sum.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient.norm() > 0, name
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize(("family", "reader"), [(tiny_t5.t5, "encoder"), (tiny_t5.bart, "model.encoder")])
def test_the_embedding_that_is_never_called_is_refused_by_name(family, reader):
    with pytest.raises(TargetError, match=rf"{reader}\.embed_tokens and .* read, .* never called; name those"):
        lofi.add_adapter(family(), lofi.LoraConfig(r=3, target_modules=["shared"]))
    model = family()
    lofi.add_adapter(model, lofi.LoraConfig(r=3, target_modules=["embed_tokens"]))
    LanguageModelLoss(model)(model, batch()).loss_sum.backward()
    moved = [name for name, p in model.named_parameters() if "lora_embedding_A" in name and p.grad.abs().sum() > 0]
    assert len(moved) == 2


def test_each_side_is_cut_or_refused_by_its_own_length(base, data, tmp_path):
    long = tiny_t5.rows(6, 5)
    for row in long:
        row["prompt"] += " thanks" * 30
    tiny_t5.write_rows(tmp_path / "long.jsonl", long)
    words = (f"data.train={tmp_path / 'long.jsonl'}", "train.epochs=null", "train.max_steps=1", "train.max_length=24",
             "train.warmup_steps=0")  # fmt: skip
    result = train(recipe(base, data, tmp_path / "run", *words), progress=False)
    assert any("6 of 6 rows" in line or "6 rows" in line for line in result.lines if "trunc" in line or "cut" in line)
    long[3]["completion"] = "bob " * 40
    tiny_t5.write_rows(tmp_path / "long.jsonl", long)
    with pytest.raises(DataError, match=r"long\.jsonl:4.*completion needs max_length 41"):
        train(recipe(base, data, tmp_path / "other", *words), progress=False)
