"""The runs of a study: each once, under a name that says what it is."""

from __future__ import annotations

import pytest

from lofi.errors import RecipeError
from lofi.recipe.sections import METHODS
from lofi.study.grid import LONGEST_NAME, expand
from lofi.study.spec import Arm, Study

BASE = {"model": "m", "data.train": "a.jsonl", "train.epochs": 1.0}


def runs(grid=None, arms=(), **base):
    return expand(Study(base=BASE | base, grid=grid or {}, arms=[Arm(name=n, overrides=o) for n, o in arms]))


def test_a_key_that_a_method_does_not_read_does_not_multiply_its_runs():
    found = runs({"method": ["full", "lora", "houlsby"], "lora.r": [4, 16], "houlsby.bottleneck_size": [3, 5, 7]})
    assert [run.arm for run in found] == [
        "full", "lora r=4", "lora r=16",
        "houlsby bottleneck_size=3", "houlsby bottleneck_size=5", "houlsby bottleneck_size=7",
    ]  # fmt: skip
    assert found[0].overrides == {"method": "full", "train.seed": 0}


def test_names_are_folders_and_the_seed_varies_slowest():
    found = runs({"method": ["full", "lora"], "lora.r": [4], "train.seed": [0, 3]})
    assert [run.name for run in found] == ["full-s0", "lora-r4-s0", "full-s3", "lora-r4-s3"]
    assert [run.seed for run in found] == [0, 0, 3, 3]
    assert {run.arm for run in found} == {"full", "lora r=4"}


def test_the_recipe_of_a_run_is_the_base_with_its_keys():
    run = runs({"lora.r": [3], "train.seed": [7]}, **{"lora.lora_alpha": 9})[0]
    assert (run.recipe.lora.r, run.recipe.lora.lora_alpha, run.recipe.train.seed) == (3, 9, 7)
    assert run.recipe.origins["lora.r"] == "command line" and run.recipe.origins["model"] == "file"


def test_steps_in_the_grid_set_the_bases_epochs_aside():
    assert runs({"train.max_steps": [5]})[0].recipe.train.epochs is None


def test_every_method_gives_a_recipe():
    found = runs({"method": list(METHODS)})
    assert len({run.name for run in found}) == len(METHODS) and not any(run.fault for run in found)


def test_lists_numbers_switches_and_paths_have_short_labels():
    targets = {"lora.target_modules": [["q_proj"], ["q_proj", "v_proj"]]}
    assert [run.arm for run in runs(targets)] == ["lora targets=q_proj", "lora targets=q_proj+v_proj"]
    assert [run.name for run in runs({"train.learning_rate": [0.0002, 0.01]})] == ["lora-lr0.0002-s0", "lora-lr0.01-s0"]
    assert [run.arm for run in runs({"lora.use_rslora": [True, False]})] == ["lora rslora", "lora"]
    assert [run.arm for run in runs({"data.train": ["d/100.jsonl", "d/1000.jsonl"]})] == [
        "lora data=100",
        "lora data=1000",
    ]


def test_arms_are_called_by_their_names_and_multiplied_with_the_grid():
    arms = [("only q", {"lora.target_modules": ["q_proj"], "lora.r": 8}), ("q and v", {"lora.r": 4})]
    assert [run.arm for run in runs({"train.seed": [1]}, arms)] == ["only q", "q and v"]
    both = runs({"method": ["full", "lora"]}, arms)
    assert [run.arm for run in both] == ["full", "lora only q", "lora q and v"]
    assert both[1].name == "lora-only-q-s0"


def test_lora_plus_belongs_to_lora_alone():
    found = runs({"method": ["full", "lora"], "train.loraplus_lr_ratio": [None, 16.0]})
    assert [run.arm for run in found] == ["full", "lora", "lora lr_ratio=16"]


def test_a_value_that_no_recipe_has_is_the_fault_of_its_run_alone():
    bad, good = runs({"lora.r": [0, 4]})
    assert good.fault is None and bad.recipe is None
    assert "lora-r0-s0" in bad.fault and "r is 0" in bad.fault and "\n" not in bad.fault
    assert "did you mean lora?" in runs({"method": ["lorra"]})[0].fault


def test_two_runs_with_one_name_are_refused():
    with pytest.raises(RecipeError, match=r"two runs would be called lora-data-x-s0 .*data.train"):
        runs({"data.train": ["a/x.jsonl", "b/x.jsonl"]})
    with pytest.raises(RecipeError, match="two runs would be called"):
        runs({}, [("Q", {"lora.r": 4}), ("q", {"lora.r": 5})])


def test_a_long_name_is_cut_and_still_tells_runs_apart():
    targets = [[f"model.layers.{i}.self_attn.q_proj" for i in range(n)] for n in (4, 5)]
    names = [run.name for run in runs({"lora.target_modules": targets})]
    assert len(set(names)) == 2 and all(len(name) <= LONGEST_NAME for name in names)


def test_names_do_not_change_when_the_grid_grows():
    small, large = runs({"lora.r": [4]}), runs({"lora.r": [2, 4, 8], "train.seed": [0, 1]})
    assert small[0].name in [run.name for run in large]
