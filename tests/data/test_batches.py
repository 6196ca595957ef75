"""Micro-batches: nothing lost, nothing mixed, nothing over the limit; packed rows give the logits of rows alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi.data.batches import group
from lofi.data.examples import Example
from lofi.data.labels import IGNORED

PAD = 9  # also a common id below, so that a mask by token id would show


@st.composite
def examples(draw):
    """Causal examples whose trained ids are all different, so that a token can be followed through."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=25))
    found, fresh = [], 100
    for row, (context, trained) in enumerate(sizes):
        ids = [PAD] * context + list(range(fresh, fresh + trained))
        found.append(Example(ids, [IGNORED] * context + ids[context:], row=row, prompt_length=context))
        fresh += trained
    return found


@settings(max_examples=60, deadline=None)
@given(examples(), st.integers(1, 120), st.booleans(), st.integers(0, 5))
def test_every_trained_token_appears_once_behind_its_own_context(given_examples, micro_tokens, pack, seed):
    batches = group(given_examples, micro_tokens=micro_tokens, pack=pack, pad_id=PAD, seed=seed)
    told = []
    for index in range(len(batches)):
        batch = batches[index]
        size = batch["input_ids"].numel()
        assert size <= micro_tokens or len(batches.members(index)) == 1 or batch["input_ids"].shape[0] == 1
        assert size == batches.sizes()[index]
        labels = batch["labels"][:, 1:]
        assert (batch["input_ids"][:, 1:][labels != IGNORED] == labels[labels != IGNORED]).all()
        assert int((labels != IGNORED).sum()) == batches.n_trained[index]
        told += labels[labels != IGNORED].tolist()
    assert sorted(told) == [label for example in given_examples for label in example.labels if label != IGNORED]
    padding = sum(batches.sizes()) - sum(len(example) for example in given_examples)
    assert batches.waste == pytest.approx(padding / sum(batches.sizes()))


@settings(max_examples=40, deadline=None)
@given(examples(), st.integers(30, 120))
def test_packed_segments_are_the_examples_themselves(given_examples, micro_tokens):
    batches = group(given_examples, micro_tokens=micro_tokens, pack=True, pad_id=PAD, max_length=40)
    for index in range(len(batches)):
        batch, members = batches[index], batches.members(index)
        assert set(batch) == {"input_ids", "position_ids", "labels"}
        assert batch["input_ids"].shape[1] <= 40
        for row in range(batch["input_ids"].shape[0]):
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            for start in starts:
                assert batch["labels"][row, start] == IGNORED
                if not members:
                    break
                example = given_examples[members[0]]
                stop = start + len(example)
                if batch["input_ids"][row, start:stop].tolist() == example.input_ids:
                    members.pop(0)
                    assert batch["labels"][row, start:stop].tolist() == example.labels
                    assert batch["position_ids"][row, start:stop].tolist() == list(range(len(example)))
        assert not members


def test_a_trained_first_token_is_not_predicted_from_the_example_before():
    whole = [Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [8, 9])]
    batches = group(whole, micro_tokens=5, pack=True, pad_id=0)
    assert batches.n_trained == [3]
    assert (batches[0]["labels"][0] == IGNORED).tolist() == [True, False, False, True, False]


def test_padding_is_on_the_right_and_masked_by_position():
    batch = group([Example([PAD, 4], [IGNORED, 4]), Example([1, 2, PAD], [IGNORED, 2, PAD])],
                  micro_tokens=99, pack=False, pad_id=PAD)[0]  # fmt: skip
    assert batch["input_ids"].tolist() == [[1, 2, PAD], [PAD, 4, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, PAD], [IGNORED, 4, IGNORED]]


def test_the_decoders_labels_are_padded_apart():
    two_sided = [
        Example([1, 2, 3], [4], task="SEQ_2_SEQ_LM"),
        Example([5], [6, 7], task="SEQ_2_SEQ_LM"),
    ]
    batches = group(two_sided, micro_tokens=10, pack=False, pad_id=0)
    assert len(batches) == 1
    assert batches.sizes() == [10]
    assert batches[0]["labels"].tolist() == [[4, IGNORED], [6, 7]]
    assert batches.n_trained == [3]
    assert len(group(two_sided, micro_tokens=9, pack=False, pad_id=0)) == 2


def test_classes_are_integers_and_several_labels_are_floats():
    single = [Example([1, 2], 1, task="SEQ_CLS"), Example([3], 0, task="SEQ_CLS")]
    several = [Example([1, 2], [1.0, 0.0, 1.0], task="SEQ_CLS")]
    batches = group(single, micro_tokens=99, pack=False, pad_id=0)
    assert batches[0]["labels"].tolist() == [1, 0]
    assert batches[0]["labels"].dtype == torch.int64
    assert batches.n_trained == [2]
    assert group(several, micro_tokens=99, pack=False, pad_id=0)[0]["labels"].dtype == torch.float32


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    many = [Example([1] * (place % 7 + 2), [IGNORED] * (place % 7 + 1) + [1]) for place in range(60)]
    for pack in (True, False):
        one, same, other = (group(many, micro_tokens=32, pack=pack, pad_id=0, seed=seed).groups for seed in (0, 0, 1))
        assert one == same
        assert one != other


def test_mistakes_of_ours_are_value_errors():
    tagged = Example([1], [0], task="TOKEN_CLS")
    with pytest.raises(ValueError, match="only CAUSAL_LM"):
        group([tagged], micro_tokens=8, pack=True, pad_id=0)
    with pytest.raises(ValueError, match="one task"):
        group([], micro_tokens=8, pack=False, pad_id=0)
    with pytest.raises(ValueError, match="one task"):
        group([tagged, Example([1, 2], [1, 2])], micro_tokens=8, pack=False, pad_id=0)
    with pytest.raises(ValueError, match="2 ids but 1 labels"):
        Example([1, 2], [1])
    with pytest.raises(IndexError):
        group([tagged], micro_tokens=8, pack=False, pad_id=0)[1]


def test_packed_rows_give_the_logits_of_each_example_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    many = [Example(ids := torch.randint(0, 37, (size,)).tolist(), ids) for size in (7, 5, 4, 3, 6, 2)]
    batches = group(many, micro_tokens=27, pack=True, pad_id=0, max_length=9)
    assert max(len(row) for one in batches.groups for row in one) > 1
    for index in range(len(batches)):
        batch = batches[index]
        with torch.no_grad():
            packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            blurred = model(input_ids=batch["input_ids"], use_cache=False).logits
        for row, members in enumerate(batches.groups[index]):
            start = 0
            for place in members:
                with torch.no_grad():
                    alone = model(input_ids=torch.tensor([many[place].input_ids]), use_cache=False).logits[0]
                stop = start + len(many[place])
                torch.testing.assert_close(packed[row, start:stop], alone, atol=1e-5, rtol=0)
                if start:  # without the positions the tolerance fails: examples would see each other
                    assert (blurred[row, start:stop] - alone).abs().max() > 1e-3
                start = stop
