"""A merged folder speaks as its adapter was trained: stop tokens and template, changed only where they differ."""

from __future__ import annotations

import json
import shutil

import pytest

from lofi.errors import RequestError
from lofi.export.merged import GENERATION, TEMPLATE, generation_config, held_template, speak_as_trained


@pytest.fixture
def folder(tmp_path, lofi_tiny):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(lofi_tiny / name, tmp_path / name)
    (tmp_path / GENERATION).write_text(json.dumps({"eos_token_id": 1, "top_k": 7}))
    return tmp_path


def test_a_stop_token_that_the_base_does_not_know_is_added(folder, rule):
    notes = speak_as_trained(folder, {"text_format": rule.to_dict()})
    assert json.loads((folder / GENERATION).read_text()) == {"eos_token_id": [3, 1], "top_k": 7}
    assert len(notes) == 1 and "[3, 1]: training did at [3], the base did not" in notes[0]
    assert speak_as_trained(folder, {"text_format": rule.to_dict()}) == []


def test_another_template_takes_the_bases_place(folder, rule):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 'old' }}"}))
    (folder / TEMPLATE).unlink()
    assert held_template(folder) == "{{ 'old' }}"
    notes = speak_as_trained(folder, {"text_format": rule.to_dict()})
    assert held_template(folder) == rule.chat.text
    assert any("the base has another" in note for note in notes)


def test_without_a_record_nothing_is_touched(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert speak_as_trained(folder, {}) == []
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_end_of_answers_is_taken_from_the_config_where_there_is_no_generation_config(folder):
    (folder / GENERATION).unlink()
    assert generation_config(folder, {"stop_ids": [5, 1]}) == ({"eos_token_id": [5, 1]}, [5])


def test_a_broken_generation_config_is_named(folder):
    (folder / GENERATION).write_text("{")
    with pytest.raises(RequestError, match=r"generation_config.json cannot be read as JSON"):
        generation_config(folder, None)
