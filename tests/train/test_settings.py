"""Every automatic choice, from stated facts; no machine is asked here."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lofi.errors import RecipeError
from lofi.models.attention import Attention
from lofi.models.dtypes import DtypeChoice
from lofi.recipe import make_recipe
from lofi.train.settings import Chosen, Facts, activation_bytes, choose, count_steps, free_bytes, training_arguments

GIB = 2**30


def facts(**changes) -> Facts:
    import torch

    settings = {
        "device": "cuda",
        "dtype": DtypeChoice(torch.bfloat16, "asked", autocast=True),
        "packs": True, "packs_why": "proved", "longest": 300, "width": 256,
        "free_bytes": 10 * GIB, "activation_bytes": 2**20, "threads": 3,
        "attention": Attention("sdpa", "proved elsewhere"),
    }  # fmt: skip
    return Facts(**(settings | changes))


def recipe(method: str = "lora", **train):
    return make_recipe({"model": "m", "method": method, "data": {"train": "t.jsonl"}, "train": train, "output": "o"})


def test_a_step_that_fits_in_memory_is_one_forward_pass():
    chosen = choose(recipe(batch_tokens=4000), facts())
    assert (chosen.accumulation, chosen.micro_tokens) == (1, 4000)


def test_a_step_that_does_not_fit_is_cut_into_the_fewest_equal_parts():
    chosen = choose(recipe(batch_tokens=4000), facts(free_bytes=4 * GIB))  # 40 % of 4 GiB: 1638 tokens of 1 MiB
    assert (chosen.accumulation, chosen.micro_tokens) == (3, 1334)
    assert "40%" in chosen.why["micro_tokens"]


def test_gradient_checkpointing_makes_room():
    chosen = choose(recipe(batch_tokens=4000, gradient_checkpointing=True), facts(free_bytes=4 * GIB))
    assert chosen.accumulation == 1


def test_the_dense_copy_that_a_quantized_base_multiplies_through_takes_room():
    asked = recipe("qlora", batch_tokens=4000)
    chosen = choose(asked, facts(free_bytes=4 * GIB, quantization="nf4", quantization_why="method qlora"))
    assert (chosen.accumulation, chosen.quantization) == (3, "nf4")
    assert "quantization: nf4 (method qlora)" in chosen.lines()
    assert choose(asked, facts(free_bytes=4 * GIB, workspace_bytes=2 * GIB)).accumulation == 5


def test_a_base_that_is_still_in_its_files_is_not_counted_as_free(monkeypatch):
    import psutil

    memory = SimpleNamespace(rss=5 * GIB, shared=3 * GIB)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: memory))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9 * GIB))
    assert free_bytes("cpu") == 9 * GIB
    assert free_bytes("cpu", base=2 * GIB) == 9 * GIB  # as large as what this process holds itself
    assert free_bytes("cpu", base=4 * GIB) == 7 * GIB
    assert free_bytes("cpu", base=40 * GIB) == 0


def test_no_part_is_shorter_than_the_longest_row():
    chosen = choose(recipe(batch_tokens=4000), facts(free_bytes=GIB // 4, longest=900))
    assert chosen.micro_tokens == 900 and chosen.accumulation == 5


def test_a_cpu_takes_bounded_parts_because_longer_ones_gain_nothing():
    chosen = choose(recipe(batch_tokens=6000), facts(device="cpu"))
    assert (chosen.accumulation, chosen.micro_tokens) == (3, 2000)


def test_parts_that_cannot_hold_the_longest_row_are_refused():
    with pytest.raises(RecipeError, match="leaves 250 tokens a forward pass, but the longest row has 300"):
        choose(recipe(batch_tokens=1000, gradient_accumulation_steps=4), facts())


def test_rows_and_parts_as_asked_are_taken_as_asked():
    chosen = choose(recipe(micro_batch_size=3, gradient_accumulation_steps=5), facts())
    assert (chosen.micro_rows, chosen.accumulation, chosen.micro_tokens) == (3, 5, None)
    chosen = choose(recipe(micro_batch_size=3, batch_tokens=3600), facts())
    assert chosen.accumulation == 4  # 3 rows of at most 300 tokens are 900


def test_each_method_has_its_own_default_rate_and_an_asked_rate_wins():
    assert choose(recipe("lora"), facts()).learning_rate == 2e-4
    assert choose(recipe("qlora"), facts()).learning_rate == choose(recipe("int8-lora"), facts()).learning_rate == 2e-4
    assert choose(recipe("full"), facts()).learning_rate == 2e-5
    assert choose(recipe("full", learning_rate=3e-4), facts()).learning_rate == 3e-4


def test_only_full_fine_tuning_runs_under_autocast():
    assert not any(choose(recipe(method), facts()).autocast for method in ("lora", "qlora", "int8-lora"))
    assert choose(recipe("full"), facts()).autocast


def test_steps_follow_from_the_micro_batches():
    chosen = replace(choose(recipe(), facts()), accumulation=4)
    counted = count_steps(chosen, recipe(epochs=2.5), 10, True)
    assert (counted.steps_per_epoch, counted.max_steps, counted.eval_steps) == (3, 8, 3)
    assert counted.warmup_steps == 1  # 3 % of 8, rounded up
    assert count_steps(chosen, recipe(max_steps=7, warmup_steps=5), 10, False).warmup_steps == 5
    assert count_steps(chosen, recipe(max_steps=2), 10, True).eval_steps == 2
    assert count_steps(chosen, recipe(scheduler="constant"), 10, False).warmup_steps == 0


def test_packed_rows_are_as_wide_as_the_model_unless_a_row_is_longer():
    assert choose(recipe(), facts()).row_tokens == 300
    assert choose(recipe(), facts(width=1024)).row_tokens == 1024


def test_choices_survive_json():
    chosen = count_steps(choose(recipe(), facts()), recipe(), 10, True)
    assert Chosen.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


def test_the_arguments_evaluate_the_base_first_but_not_again_on_resume(tmp_path):
    asked = recipe()
    chosen = count_steps(choose(asked, facts(device="cpu")), asked, 10, True)
    fresh = training_arguments(chosen, asked, tmp_path, fresh=True)
    assert fresh.eval_on_start and fresh.report_to == [] and fresh.use_cpu and not fresh.bf16
    assert not training_arguments(chosen, asked, tmp_path, fresh=False).eval_on_start


def test_the_activation_estimate_grows_with_layers_width_and_element():
    config = SimpleNamespace(num_hidden_layers=2, hidden_size=100, intermediate_size=300)
    assert activation_bytes(config, 2) == 2 * (1400 + 1200) * 2
