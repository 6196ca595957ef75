"""generate, chat, evaluate, inspect and verify on a run that `lofi train` made."""

from __future__ import annotations

import io
import json

import pytest

from lofi.cli.evaluate import split_in
from lofi.cli.generate import read_prompt, sampling_of
from lofi.cli.inspect import kind_of
from lofi.cli.main import main
from lofi.cli.verify import recorded_in
from lofi.errors import RecipeError


def asked(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_adapter_answers_in_the_format_it_was_trained_with(capsys, small_model, finished):
    flags = ["--model", str(small_model), "--max-new-tokens", "5", "--temperature", "0", "--prompt", "count to 3"]
    base = asked(capsys, "generate", *flags)["answers"]
    both = asked(capsys, "generate", *flags, "--adapter", str(finished), "--adapter", f"again={finished}")["answers"]
    assert [answer["who"] for answer in base] == ["base"]
    assert [answer["who"] for answer in both] == ["first", "again"]
    assert both[0]["text"] == both[1]["text"] != base[0]["text"]
    assert both[0]["tokens"] <= 5


def test_a_seed_repeats_a_drawn_answer_and_another_seed_does_not(capsys, small_model):
    def drawn(seed: int) -> str:
        flags = ["--prompt", "x", "--max-new-tokens", "8", "--temperature", "1.5", "--seed", str(seed)]
        return asked(capsys, "generate", "--model", str(small_model), *flags)["answers"][0]["text"]

    assert drawn(1) == drawn(1) != drawn(2)


def test_the_flags_say_how_to_draw():
    assert sampling_of(None, None, 0) == "model"
    assert sampling_of(0.0, 0.5, 0) is None
    drawn = sampling_of(None, 0.5, 3)
    assert (drawn.temperature, drawn.top_p, drawn.seed) == (1.0, 0.5, 3)


def test_a_prompt_can_come_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert read_prompt("-") == "two\nlines"
    with pytest.raises(RecipeError, match="--prompt is empty"):
        read_prompt("  ")


def test_a_conversation_changes_its_speaker_and_is_one_object(capsys, monkeypatch, small_model, finished):
    lines = "count to 3\n/adapter bas\n/adapter base\nand to 4\n\n/what\n/new\nagain\n/exit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    flags = ["--model", str(small_model), "--adapter", str(finished), "--max-new-tokens", "4", "--temperature", "0"]
    said = asked(capsys, "chat", *flags)["messages"]
    assert [turn.get("who") for turn in said] == [None, "first", None, "base", None, "base"]
    assert [turn["content"] for turn in said[::2]] == ["count to 3", "and to 4", "again"]


def test_a_conversation_ends_with_its_input_and_says_what_it_forgets(capsys, monkeypatch, small_model):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["tell me more about numbers please"] * 4)))
    assert main(["chat", "--model", str(small_model), "--max-new-tokens", "70", "--temperature", "0"]) == 0
    assert "is forgotten" in capsys.readouterr().err


def test_the_base_stands_beside_its_adapters_with_intervals_and_a_test(capsys, small_model, data, finished):
    flags = ["--model", str(small_model), "--adapter", str(finished), "--data", str(data), "--max-new-tokens", "4"]
    found = asked(capsys, "evaluate", *flags, "--metrics", "rouge1, perplexity")
    keys = {(row["who"], row["metric"]) for row in found["results"]}
    assert keys == {(who, metric) for who in ("base", "first") for metric in ("rouge1", "perplexity")}
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 4 for row in found["results"])
    assert [row["who"] for row in found["comparison"]] == ["first", "first"]
    losses = {row["who"]: row["value"] for row in found["results"] if row["metric"] == "perplexity"}
    assert losses["first"] < losses["base"]


def test_figures_for_people_are_tables(capsys, small_model, data, finished):
    flags = ["--model", str(small_model), "--adapter", f"mine={finished}", "--data", str(data / "test.jsonl")]
    assert main(["evaluate", *flags, "--metrics", "perplexity", "--limit", "2"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("perplexity", "base", "mine", "against the base"))


def test_the_split_is_test_where_there_is_one(tmp_path):
    assert split_in(str(tmp_path)) == "validation"
    (tmp_path / "test.jsonl").write_text("")
    assert split_in(str(tmp_path)) == "test"
    assert split_in("org/set") == "test"


def test_an_adapter_shows_targets_rank_multiplier_and_spectrum(capsys, finished):
    found = asked(capsys, "inspect", str(finished))
    assert (found["kind"], found["config"]["r"], len(found["modules"])) == ("adapter", 3, 14)
    module = found["modules"][0]
    assert (module["rank"], module["scale"], len(module["singular_values"])) == (3, 4.0, 3)
    assert module["norm"] == pytest.approx(sum(v * v for v in module["singular_values"]) ** 0.5)
    assert found["golden_prompts"] > 0
    assert main(["inspect", str(finished)]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("2 x q_proj", "alpha 12", "alpha / r = 4", "45 x 32"))
    assert main(["inspect", str(finished), "--all"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_data_shows_which_tokens_are_trained(capsys, small_model, data):
    found = asked(capsys, "inspect", str(data / "train.jsonl"), "--model", str(small_model))
    assert found["report"]["eos_trained"] == found["report"]["completions"] == 8
    assert main(["inspect", str(data), "--model", str(small_model), "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "EOS trained in 8/8" in text
    assert "⟦one two<|im_end|>" in text


def test_a_model_shows_what_could_be_adapted(capsys, small_model):
    found = asked(capsys, "inspect", str(small_model))
    assert found["task"] == "CAUSAL_LM"
    assert {"name": "gate_proj", "shape": "45 x 32 Linear", "count": 2} in found["linears"]
    assert found["tied"] == [["lm_head.weight", "model.embed_tokens.weight"]]
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (45, 32), (45, 32), (32, 45)]
    assert found["trainable_at_r16"] == 2 * sum(16 * (rows + columns) for rows, columns in shapes)


def test_what_stands_at_a_path_is_told_or_asked_for(tmp_path, small_model, finished, data):
    assert kind_of(str(finished), None) == kind_of(str(finished / "adapter"), "m") == "adapter"
    assert kind_of(str(small_model), None) == "model"
    (tmp_path / "full" / "model").mkdir(parents=True)
    (tmp_path / "full" / "model" / "config.json").write_text("{}")
    assert kind_of(str(tmp_path / "full"), None) == "model"
    assert kind_of(str(data), "m") == "data"
    for path, model in ((data, None), (tmp_path / "none", None), (small_model, "m")):
        with pytest.raises(RecipeError, match="--model"):
            kind_of(str(path), model)


def test_verify_replays_and_finds_what_was_changed(capsys, finished, adapter, small_model):
    assert asked(capsys, "verify", str(finished))["same"] is True
    record = json.loads((adapter / "lofi.json").read_text())
    record["golden"]["prompts"][0]["top"][0][0][1] += 1.0
    (adapter / "lofi.json").write_text(json.dumps(record))
    assert main(["verify", str(adapter), "--model", str(small_model)]) == 1
    assert "does not say what it said" in capsys.readouterr().err


def test_verify_replays_in_the_dtype_that_was_recorded():
    assert recorded_in({"dtype": "bf16"}) == "bf16"
    assert recorded_in({}) == "auto"  # folders of before


def test_doctor_says_what_lofi_will_choose(capsys):
    found = asked(capsys, "doctor")
    assert found["lofi will choose"]["compute dtype"] in ("bf16", "fp16", "fp32")
    assert found["versions"]["torch"]
    assert found["machine"]["cores"] >= 1
