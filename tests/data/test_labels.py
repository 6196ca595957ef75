"""Labels by position, and label lists."""

from __future__ import annotations

import pytest

from lofi.data.labels import IGNORED, LabelSet, causal_labels, word_labels
from lofi.errors import DataError


def test_labels_follow_positions_not_ids():
    assert causal_labels([7, 0, 7, 0], [False, False, True, True]) == [IGNORED, IGNORED, 7, 0]


def test_the_first_label_is_never_trained():
    assert causal_labels([7, 8], [True, True]) == [IGNORED, 8]


def test_the_first_subword_of_a_word_has_its_tag():
    assert word_labels([None, 0, 0, 1, 3, 3, None], [5, 6, 7, 8]) == [IGNORED, 5, IGNORED, 6, 8, IGNORED, IGNORED]


def test_found_labels_are_sorted_and_given_ones_keep_their_order():
    assert LabelSet.of(["b", "a", "b"]).values == ["a", "b"]
    assert LabelSet.of([3, 1]).values == [1, 3]
    assert LabelSet.of(["a"], ["b", "a"]).values == ["b", "a"]


def test_an_integer_is_an_index_where_labels_are_names():
    labels = LabelSet(["negative", "positive"])
    assert (labels.index(1), labels.index("negative")) == (1, 0)
    with pytest.raises(DataError, match="label 2 is none"):
        labels.index(2)
    assert LabelSet([4, 2]).index(2) == 1
    with pytest.raises(DataError, match="label 0 is none"):
        LabelSet([4, 2]).index(0)


def test_several_labels_are_a_vector():
    assert LabelSet(["a", "b", "c"]).several(["c", "a"]) == [1.0, 0.0, 1.0]
    assert LabelSet(["a", "b"]).several([]) == [0.0, 0.0]


def test_counts_include_labels_that_do_not_occur():
    assert LabelSet(["a", "b"]).counts([1, 1]) == {"a": 0, "b": 2}


@pytest.mark.parametrize(("found", "says"), [(["a", 1], "mix integers and strings"), (["a"], "only label is ['a']")])
def test_labels_that_cannot_be_learned_are_refused(found, says):
    with pytest.raises(DataError) as caught:
        LabelSet.of(found)
    assert says in str(caught.value)


def test_a_repeated_or_misspelt_label_is_named():
    with pytest.raises(DataError, match="name one twice"):
        LabelSet(["a", "a"])
    with pytest.raises(DataError, match="nearest 'B-person'"):
        LabelSet(["B-person", "O"]).index("B-preson")
