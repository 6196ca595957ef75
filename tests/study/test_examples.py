"""Every study that ships can be read, and says what its comments claim."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from conftest import REPOSITORY
from lofi.demo import shipped
from lofi.demo.shipped import with_shipped
from lofi.models.counting import count_adapter
from lofi.study.grid import expand
from lofi.study.spec import Study, load_study

FOLDERS = (REPOSITORY / "examples" / "studies", REPOSITORY / "results" / "studies")
STUDIES = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))
QUALITY = [path for path in STUDIES if "kind: latency" not in path.read_text(encoding="utf-8")]
WORDS = ("lofi compare examples/studies/", "Takes ", "Source ", "Yours")


def named(path: Path) -> str:
    return f"{path.parent.parent.name}/{path.name}"


def of(path: Path, tmp_path: Path) -> Study:
    """The study with its `demo:` names as paths, as `lofi compare` runs it."""
    study = load_study(path)
    values = with_shipped({"base": study.base, "grid": study.grid}, tmp_path)
    arms = [arm.model_copy(update={"overrides": with_shipped(arm.overrides, tmp_path)}) for arm in study.arms]
    return study.model_copy(update=values | {"arms": arms})


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(shipped, "make_rows", lambda count, seed, split: [{"prompt": split, "completion": "x"}])


def test_there_is_a_study_for_each_question_of_the_paper():
    here = {path.stem for path in FOLDERS[0].glob("*.yaml")}
    assert here >= {"methods", "methods-e2e", "matrices", "rank", "data-size", "latency", "latency-small"}


@pytest.mark.parametrize("path", STUDIES, ids=named)
def test_a_study_that_ships_is_read_and_every_run_of_it_is_a_recipe(path, tmp_path):
    study = of(path, tmp_path)
    runs = expand(study) if study.kind == "quality" else []
    assert study.kind == "latency" or len(runs) >= 2
    assert [(run.name, run.fault) for run in runs if run.fault] == []


@pytest.mark.parametrize("path", [path for path in STUDIES if path.parent == FOLDERS[0]], ids=named)
def test_an_example_says_what_it_asks_what_it_takes_and_how_to_use_it(path):
    text = path.read_text(encoding="utf-8")
    missing = [word for word in WORDS if word not in text]
    assert not missing and f"examples/studies/{path.name}" in text


@pytest.mark.parametrize("path", QUALITY, ids=named)
def test_the_arms_that_a_study_names_are_the_arms_that_run(path, tmp_path):
    given = yaml.safe_load(path.read_text(encoding="utf-8")).get("arms") or []
    labels = {run.arm for run in expand(of(path, tmp_path))}
    assert not given or all(any(arm["name"] in label for label in labels) for arm in given)
    assert len(labels) >= len(given)


def budgets(path: Path, model: Path, tmp_path: Path) -> dict[str, int]:
    """Arm -> trained parameters, counted by attaching the adapter on the meta device."""
    config = AutoConfig.from_pretrained(model)
    found = {}
    for run in expand(of(path, tmp_path)):
        adapter = dataclasses.replace(run.recipe.adapter_config(), task_type="CAUSAL_LM")
        found[run.arm] = count_adapter(config, adapter).trainable
    return found


def test_every_choice_of_matrices_trains_the_same_number_of_parameters(lofi_tiny, tmp_path):
    found = budgets(FOLDERS[0] / "matrices.yaml", lofi_tiny, tmp_path)
    assert len(found) == 9 and set(found.values()) == {46_080}


def test_the_choices_of_matrices_on_stories260k_differ_by_at_most_2_5_percent(shared, tmp_path):
    found = budgets(FOLDERS[1] / "matrices-stories260k.yaml", shared / "models" / "stories260k", tmp_path)
    assert len(found) == 9 and max(found.values()) <= 1.025 * min(found.values())


def test_the_small_study_of_methods_runs_on_what_ships_alone(tmp_path, lofi_tiny):
    runs = expand(of(FOLDERS[0] / "methods.yaml", tmp_path))
    assert {run.method for run in runs} == {"full", "lora", "houlsby", "prefix"} and len(runs) == 8
    for run in runs:
        paths = [run.recipe.model, run.recipe.data.train, run.recipe.data.validation, run.recipe.data.test]
        assert run.recipe.model == str(lofi_tiny)
        assert all(Path(path).is_absolute() and Path(path).exists() for path in paths)
