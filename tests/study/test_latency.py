"""The latency study on a tiny shape: who is timed, over which weights, and what the rows say. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pydantic
import pytest
import torch

from lofi.adapters.registry import adapters_of
from lofi.errors import ModelError, RecipeError
from lofi.study import latency
from lofi.study.latency import LatencySpec, Setting, Timed, adapted, interleaved, median, open_shape, run_latency

TINY = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 53, "n_positions": 40}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(latency.SHAPES, "tiny", TINY)
    monkeypatch.setattr(latency, "_PAUSE", 0.0)


def spec(**changed) -> LatencySpec:
    given = {"shape": "tiny", "settings": [[2, 7, 900]], "methods": ["lora-merged", "lora"], "dtype": "fp32"}
    return LatencySpec(**{**given, "rounds": 3, "warm_up": 1, **changed})


def rows_of(tmp_path, **changed) -> list[dict]:
    said: list[str] = []
    found = run_latency(SimpleNamespace(latency=spec(**changed)), tmp_path, said.append)
    assert len(said) == len(spec(**changed).settings)
    return found


def test_the_spec_can_be_read_without_torch():
    code = "import sys, lofi.study.latency as m; m.LatencySpec(); print(*({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_setting_has_a_row_for_the_base_and_one_for_every_method(tmp_path):
    rows = rows_of(tmp_path, settings=[[2, 7, 900], [1, 5, 900]])
    assert [(r["who"], r["batch"], r["sequence"]) for r in rows] == [
        *((who, 2, 7) for who in ("base", "lora-merged", "lora")),
        *((who, 1, 5) for who in ("base", "lora-merged", "lora")),
    ]
    for row in rows:
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert all(r["ratio"] == 1.0 and r["parameters"] == 0 for r in rows if r["who"] == "base")


def test_a_merged_side_has_the_update_in_its_weights_and_no_adapter():
    model = open_shape(spec())
    setting = Setting(batch=1, sequence=5, parameters=900.0)
    merged, _ = adapted(model, Timed(method="lora-merged"), setting, seed=0)
    unmerged, _ = adapted(model, Timed(method="lora"), setting, seed=0)
    ids = torch.arange(5)[None]
    assert not adapters_of(merged) and not adapters_of(model) and list(adapters_of(unmerged)) == ["default"]
    assert not torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)
    torch.testing.assert_close(merged(ids).logits, unmerged(ids).logits, atol=1e-5, rtol=1e-4)


def test_sides_share_the_weights_that_a_method_leaves_alone():
    model = open_shape(spec())
    side, _ = adapted(model, Timed(method="lora", size=3), Setting(batch=1, sequence=5), seed=0)
    own = {tensor.data_ptr() for tensor in model.parameters()}
    shared = [name for name, tensor in side.named_parameters() if tensor.data_ptr() in own]
    assert len(shared) == len(list(model.named_parameters()))
    merged, _ = adapted(model, Timed(method="lora-merged", size=3), Setting(batch=1, sequence=5), seed=0)
    parted = [name for name, tensor in merged.named_parameters() if tensor.data_ptr() not in own]
    assert parted and all(name.endswith("weight") and ".ln_" not in name and "wte" not in name for name in parted)


@pytest.mark.parametrize("method", ["lora", "lora-merged", "houlsby", "adapter-lin", "prefix", "prompt"])
def test_the_size_is_the_one_whose_parameters_come_closest_to_the_settings(method):
    model = open_shape(spec())
    wanted = 2000.0
    _, facts = adapted(model, Timed(method=method), Setting(batch=1, sequence=5, parameters=wanted), seed=0)
    off = abs(facts["parameters"] - wanted)
    for other in (facts["size"] - 1, facts["size"] + 1):
        if other:
            _, near = adapted(model, Timed(method=method, size=other), Setting(batch=1, sequence=5), seed=0)
            assert abs(near["parameters"] - wanted) >= off


def test_a_size_that_was_given_wins_and_none_at_all_is_the_methods_default():
    model = open_shape(spec())
    asked, _ = Timed(method="lora", size=5), None
    assert adapted(model, asked, Setting(batch=1, sequence=5, parameters=900.0), seed=0)[1]["size"] == 5
    assert adapted(model, Timed(method="lora"), Setting(batch=1, sequence=5), seed=0)[1]["size"] == 16


def test_every_method_can_be_timed_in_both_ways_and_changes_what_the_model_says(tmp_path):
    names = list(latency.SIZE_OF)
    rows = rows_of(tmp_path / "forward", methods=names, rounds=2, settings=[[2, 7, 400]])
    assert [row["who"] for row in rows] == ["base", *names]
    assert len(rows_of(tmp_path / "decode", methods=names, rounds=2, new_tokens=3, settings=[[2, 7, 400]])) == 1 + len(
        names
    )
    model, ids = open_shape(spec()), torch.arange(6)[None]
    for name in names:
        side, _ = adapted(model, Timed(method=name), Setting(batch=1, sequence=6, parameters=400.0), seed=0)
        assert not torch.allclose(side(ids).logits, model(ids).logits, atol=1e-6), name


def test_decoding_makes_the_tokens_that_were_asked_for():
    asked = spec(new_tokens=4)
    made = latency.call(open_shape(asked), asked, asked.settings[0])()
    assert made.shape == (2, 7 + 4)


def test_every_side_is_called_once_a_round_and_another_one_begins_each_round():
    order: list[str] = []
    sides = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleaved(sides, rounds=4, warm_up=2, synchronize=lambda: None)
    assert "".join(order) == "abc" * 2 + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_interval_of_a_median_lies_around_it_and_narrows_with_rounds():
    few, many = [1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0, 16.0] * 20
    value, low, high = median(few)
    assert (value, low < value < high) == (4.0, True)
    assert median(many)[2] - median(many)[1] < high - low
    assert median([3.0, 3.0]) == (3.0, 3.0, 3.0)


def test_ratios_are_taken_round_by_round():
    slow_rounds = [1.0, 10.0, 1.0, 10.0, 1.0]
    row = latency.figures([1.5 * second for second in slow_rounds], slow_rounds)
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (1.5, 1.5, 1.5)
    assert row["ms"] == 1500.0


def test_settings_that_are_done_are_not_measured_again(tmp_path, monkeypatch):
    first = rows_of(tmp_path)
    measured: list[Setting] = []
    real = latency.measure
    monkeypatch.setattr(latency, "measure", lambda m, s, setting: measured.append(setting) or real(m, s, setting))
    again = rows_of(tmp_path, settings=[[2, 7, 900], [1, 5, 900]])
    assert again[:3] == first and [(s.batch, s.sequence) for s in measured] == [(1, 5)]
    rows_of(tmp_path, rounds=4)  # another spec: nothing that was kept counts
    assert len(measured) == 2


def test_kept_rows_that_cannot_be_read_are_an_error_that_names_the_file(tmp_path):
    rows_of(tmp_path)
    kept = tmp_path / latency.KEPT
    kept.write_text(json.dumps(json.loads(kept.read_text()))[:-20])
    with pytest.raises(RecipeError, match=r"latency\.json cannot be read"):
        rows_of(tmp_path)


def test_a_setting_longer_than_the_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="asks for 41 positions, but tiny has 40"):
        rows_of(tmp_path, settings=[[1, 38]], new_tokens=3)
    with pytest.raises(ModelError, match="prompt 34 asks for 41 positions, but tiny has 40"):
        rows_of(tmp_path, settings=[[1, 7]], methods=[{"method": "prompt", "size": 34}])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"methods": ["houlsbi"]}, "did you mean houlsby"),
        ({"methods": ["lora", "lora"]}, "names lora twice"),
        ({"methods": [{"method": "prefix", "name": "base"}]}, "names base twice"),
        ({"methods": []}, "latency.methods is empty"),
        ({"settings": []}, "latency.settings is empty"),
        ({"settings": [[0, 5]]}, "greater than or equal to 1"),
        ({"rounds": 1}, "greater than or equal to 2"),
    ],
)
def test_a_spec_that_cannot_be_measured_is_refused(changed, said):
    with pytest.raises(pydantic.ValidationError, match=said):
        spec(**changed)
