"""--adapter: a path or name=path, a run folder or the adapter in it."""

from __future__ import annotations

import json

import pytest

from lofi.cli.flags import column_map, named_adapters
from lofi.cli.main import main
from lofi.errors import RecipeError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "v1.5" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return tmp_path / "v1.5"


def test_a_run_folder_stands_for_its_adapter_and_names_it(run):
    assert named_adapters([str(run)]) == {"v1_5": run / "adapter"}
    assert named_adapters([str(run / "adapter")]) == {"v1_5": run / "adapter"}


def test_a_name_before_the_path_wins(run):
    assert named_adapters([f"poet={run}", str(run)]) == {"poet": run / "adapter", "v1_5": run / "adapter"}


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    folder = tmp_path / "lr=3"
    folder.mkdir()
    assert list(named_adapters([str(folder)])) == ["lr=3"]


@pytest.mark.parametrize("given", [["a=x", "a=y"], ["base=x"], ["a.b=x"]])
def test_names_that_cannot_be_told_apart_are_refused(given):
    with pytest.raises(RecipeError, match="name="):
        named_adapters(given)


def test_no_adapter_is_no_adapter():
    assert named_adapters(None) == {}


def test_columns_are_read_as_pairs_and_anything_else_is_refused():
    assert column_map("prompt=dialogue, completion=summary") == {"prompt": "dialogue", "completion": "summary"}
    assert column_map(None) is None
    for wrong in ("prompt", "=dialogue", "prompt=a,", ""):
        with pytest.raises(RecipeError, match=r"expected name=name"):
            column_map(wrong)


def test_every_verb_takes_the_model_that_ships_by_its_name(capsys):
    asked = ["--prompt", "x", "--max-new-tokens", "1", "--json"]
    assert main(["generate", "--model", "demo:model", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["who"] == "base"
    assert main(["generate", "--model", "demo:modle", *asked]) == 2
    assert "the one that ships with lofi is demo:model" in capsys.readouterr().err
