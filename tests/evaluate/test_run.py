"""evaluate(): base beside adapters on real records, every kind of data, with intervals and paired tests."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForSequenceClassification as SequenceClassifier
from transformers import LlamaForTokenClassification as TokenClassifier

from lofi.adapters.attach import add_adapter
from lofi.adapters.config import LoraConfig
from lofi.data.records import from_rows
from lofi.errors import DataError, RequestError, TargetError
from lofi.evaluate.perplexity import token_losses
from lofi.evaluate.run import Options, evaluate, side_by_side
from lofi.evaluate.subjects import _question

PAIRS = [
    {"prompt": "the cat", "completion": "sat on the mat", "references": ["sat on the mat", "sat there"]},
    {"prompt": "a very much longer prompt than the other one", "completion": "yes"},
    {"prompt": "Hà Nội là", "completion": "thủ đô của Việt Nam"},
    {"prompt": "one two", "completion": "three four five"},
]
QUICK = Options(max_new_tokens=6, batch_tokens=200, resamples=200)


@pytest.fixture(scope="module")
def tokenizer(lofi_tiny):
    return AutoTokenizer.from_pretrained(lofi_tiny)


def tiny(kind, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=128, pad_token_id=1, **sizes, **changes)
    return kind(config).eval()


def adapted(kind=LlamaForCausalLM, **changes):
    """A tiny model with two adapters that change what it says (B is not zero)."""
    model = tiny(kind, **changes)
    for name, size in (("mild", 0.05), ("wild", 1.0)):
        add_adapter(model, LoraConfig(r=3, lora_alpha=5), name=name)
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key and key.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=size)
    return model


def test_the_base_stands_beside_every_adapter_with_intervals_and_tests(tokenizer):
    result = evaluate(adapted(), tokenizer, from_rows(PAIRS), ["rouge", "perplexity", "stop_rate"], options=QUICK)
    metrics = ["rouge1", "rouge2", "rougeL", "rougeLsum", "perplexity", "stop_rate"]
    assert [(row.who, row.metric) for row in result] == [(who, m) for who in ("base", "mild", "wild") for m in metrics]
    assert all(row.low <= row.value <= row.high and row.n == 4 for row in result)
    tested = [(test.who, test.metric) for test in result.comparison]
    assert tested == [(who, metric) for who in ("mild", "wild") for metric in metrics]
    for test in result.comparison:
        difference = result.value(test.who, test.metric) - result.value("base", test.metric)
        assert test.difference == pytest.approx(difference, abs=1e-9)
    assert result.value("wild", "perplexity") != pytest.approx(result.value("base", "perplexity"), rel=0.01)
    assert json.loads(json.dumps(result.to_dict()))["results"][0]["who"] == "base"


def test_the_base_beside_adapters_is_the_base_alone(tokenizer):
    beside = evaluate(adapted(), tokenizer, from_rows(PAIRS), ["perplexity", "exact_match"], options=QUICK)
    alone = evaluate(tiny(LlamaForCausalLM), tokenizer, from_rows(PAIRS), ["perplexity", "exact_match"], options=QUICK)
    assert [row for row in beside if row.who == "base"] == list(alone)
    assert beside.answers["base"] == alone.answers["base"]
    assert alone.comparison == []


def test_perplexity_is_that_of_the_prepared_rows(tokenizer):
    from lofi.data.prepare import prepare

    model, records = tiny(LlamaForCausalLM), from_rows(PAIRS)
    losses = token_losses(model, prepare(records, tokenizer, task="CAUSAL_LM").examples)
    found = evaluate(model, tokenizer, records, ["perplexity", "loss"], options=QUICK)
    assert found.value("base", "loss") == pytest.approx(losses[:, 0].sum() / losses[:, 1].sum(), rel=1e-6)
    assert found.value("base", "perplexity") == pytest.approx(np.exp(found.value("base", "loss")), rel=1e-9)


def test_names_in_the_rows_are_the_callers_and_the_models_choice_is_kept(tokenizer):
    from lofi.adapters.switch import active_adapters, set_adapter

    model = adapted()
    set_adapter(model, "mild")
    who = {"plain": None, "tuned": "wild", "both": ["mild", "wild"]}
    result = evaluate(model, tokenizer, from_rows(PAIRS), ["loss"], who=who, options=QUICK)
    assert [row.who for row in result] == ["plain", "tuned", "both"]
    assert {test.who for test in result.comparison} == {"tuned", "both"}
    assert active_adapters(model) == ("mild",)
    assert evaluate(model, tokenizer, from_rows(PAIRS), ["loss"], who={"x": "wild"}, options=QUICK).comparison == []


def test_the_callers_own_metric_is_a_row_like_any_other(tokenizer):
    own = {"length": lambda text, row: float(len(text) > len(row["completion"]))}
    result = evaluate(adapted(), tokenizer, from_rows(PAIRS), ["exact_match"], extra=own, options=QUICK)
    assert {row.metric for row in result} == {"exact_match", "length"}
    answers = result.answers["wild"]
    expected = np.mean([len(one.text) > len(row["completion"]) for one, row in zip(answers, PAIRS, strict=True)])
    assert result.value("wild", "length") == expected


def test_conversations_are_asked_for_their_last_answer(tokenizer):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    more = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "bye"}]
    assert _question({"messages": turns + more}) == ([*turns, more[0]], ["bye"])
    records = from_rows([{"messages": turns}, {"messages": turns + more}])
    result = evaluate(tiny(LlamaForCausalLM), tokenizer, records, ["exact_match", "loss"], options=QUICK)
    assert [row.n for row in result] == [2, 2]


def test_plain_text_has_a_perplexity_and_no_answers(tokenizer):
    records = from_rows([{"text": "a line of text"}, {"text": "another line of it"}])
    result = evaluate(tiny(LlamaForCausalLM), tokenizer, records, options=QUICK)
    assert [row.metric for row in result] == ["perplexity", "loss"]
    assert result.answers["base"] == []


def test_one_row_has_figures_without_intervals(tokenizer):
    result = evaluate(adapted(), tokenizer, from_rows(PAIRS[:1]), ["loss"], options=QUICK)
    assert all(row.low is None and row.high is None for row in result)
    assert all(test.p is None for test in result.comparison)


def test_prompts_that_leave_no_room_are_cut_and_counted(tokenizer):
    long = {"prompt": "word " * 300, "completion": "end"}
    result = evaluate(tiny(LlamaForCausalLM), tokenizer, from_rows([*PAIRS, long]), ["bleu", "loss"], options=QUICK)
    assert [note for note in result.notes if note.startswith("1 of 5")] == [
        "1 of 5 rows were too long and cut on the left (loss).",
        "1 of 5 prompts were too long and cut on the left (answers).",
    ]


def test_the_notes_say_how_words_were_cut(tokenizer):
    options = Options(max_new_tokens=3, language="english", stem=True, resamples=10)
    result = evaluate(tiny(LlamaForCausalLM), tokenizer, from_rows(PAIRS), ["rougeL", "chrf"], options=options)
    assert "rouge_score, Porter stems" in result.notes[0]
    assert "sacrebleu" in result.notes[1]


def test_single_labels_are_named_and_scored(tokenizer):
    model = adapted(SequenceClassifier, num_labels=3)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    pairs = [("a b", "good"), ("c", "bad"), ("d e f", "fair"), ("g", "bad")]
    rows = [{"text": text, "label": label} for text, label in pairs]
    result = evaluate(model, tokenizer, from_rows(rows), ["accuracy", "macro_f1", "micro_f1"], options=QUICK)
    said = result.answers["wild"]
    assert set(said) <= {"bad", "fair", "good"}
    assert result.value("wild", "accuracy") == np.mean([a == row["label"] for a, row in zip(said, rows, strict=True)])
    assert result.value("wild", "micro_f1") == pytest.approx(result.value("wild", "accuracy"), abs=1e-12)


def test_several_labels_a_row_are_sets(tokenizer):
    rows = [{"text": "a b", "labels": ["x", "z"]}, {"text": "c", "labels": []}, {"text": "d", "labels": ["y"]}]
    model = tiny(SequenceClassifier, num_labels=3, problem_type="multi_label_classification")
    result = evaluate(model, tokenizer, from_rows(rows), options=QUICK)
    right = [set(said) == set(row["labels"]) for said, row in zip(result.answers["base"], rows, strict=True)]
    assert result.value("base", "accuracy") == pytest.approx(np.mean(right), abs=1e-12)


def test_every_word_gets_a_tag_also_those_that_were_cut_off(tokenizer):
    tags = ["O", "B-per", "I-per"]
    rows = [{"tokens": ["Anna", "Lee", "walks"], "tags": [1, 2, 0]}, {"tokens": ["word"] * 20, "tags": [0] * 19 + [1]}]
    options = Options(max_length=12, labels=tuple(tags), resamples=50)
    result = evaluate(tiny(TokenClassifier, num_labels=3), tokenizer, from_rows(rows), options=options)
    assert [len(said) for said in result.answers["base"]] == [3, 20]
    assert result.answers["base"][1][-1] == "O"
    assert result.notes == ["1 of 2 rows were too long and cut on the right."]
    golds = [tags[tag] for row in rows for tag in row["tags"]]
    said = [tag for row in result.answers["base"] for tag in row]
    right = sum(a == b for a, b in zip(said, golds, strict=True))
    assert result.value("base", "accuracy") == pytest.approx(right / 23, abs=1e-12)


def test_a_word_that_becomes_no_token_is_outside_and_moves_no_other_tag(tokenizer):
    """Words and tags would slide apart if the n-th tag were taken for the n-th word."""
    model = tiny(TokenClassifier, num_labels=2)
    whole = [{"tokens": ["Anna", "walks", "home"], "tags": ["A", "A", "B"]}]
    holed = [{"tokens": ["Anna", "", "walks", "home"], "tags": ["A", "B", "A", "B"]}]
    options = Options(labels=("A", "B"), resamples=10)
    said = evaluate(model, tokenizer, from_rows(whole), ["accuracy"], options=options).answers["base"][0]
    found = evaluate(model, tokenizer, from_rows(holed), ["accuracy"], options=options).answers["base"][0]
    assert found == [said[0], "O", *said[1:]]


def test_different_models_can_stand_side_by_side(tokenizer):
    records = from_rows(PAIRS)
    base = evaluate(tiny(LlamaForCausalLM), tokenizer, records, ["loss"], options=QUICK)
    other = evaluate(adapted(), tokenizer, records, ["loss"], who={"full": "wild"}, options=QUICK)
    both = side_by_side([base, other], base="base", options=QUICK)
    assert [row.who for row in both] == ["base", "full"]
    expected = other.value("full", "loss") - base.value("base", "loss")
    assert both.comparison[0].difference == pytest.approx(expected, abs=1e-9)
    with pytest.raises(RequestError, match="base occurs twice"):
        side_by_side([base, base], base="base")
    with pytest.raises(RequestError, match="nobody is called 'nobody'"):
        side_by_side([base, other], base="nobody")


def test_the_same_seed_gives_the_same_rows(tokenizer):
    once, again = (evaluate(adapted(), tokenizer, from_rows(PAIRS), ["rouge"], options=QUICK) for _ in range(2))
    assert once.rows == again.rows
    assert once.comparison == again.comparison


def test_progress_names_who_and_what(tokenizer):
    seen = []
    options = Options(max_new_tokens=3, resamples=10, on_progress=lambda *news: seen.append(news))
    evaluate(adapted(), tokenizer, from_rows(PAIRS), ["loss", "bleu"], who={"w": "wild"}, options=options)
    assert ("w: loss", 4, 4) in seen
    assert ("w: answers", 4, 4) in seen


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metrics": ["rogue"]}, RequestError, "nearest 'rouge'"),
        ({"metrics": ["accuracy"]}, RequestError, "kind sft"),
        ({"who": {}}, RequestError, "nobody was named"),
        ({"who": {"a": "mild "}}, TargetError, "mild"),
        ({"options": Options(max_new_tokens=128)}, RequestError, "no room for a prompt in 128 tokens"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate(adapted(), tokenizer, from_rows(PAIRS), **{"metrics": ["bleu"], "options": QUICK, **arguments})


def test_a_model_of_another_task_is_refused(tokenizer):
    with pytest.raises(RequestError, match=r"LlamaForCausalLM .CAUSAL_LM. cannot .* task=SEQ_CLS"):
        evaluate(tiny(LlamaForCausalLM), tokenizer, from_rows([{"text": "a", "label": 0}, {"text": "b", "label": 1}]))


def test_labels_that_the_model_does_not_have_are_refused(tokenizer):
    rows = from_rows([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(RequestError, match="among 3 labels but the data has 2"):
        evaluate(tiny(SequenceClassifier, num_labels=3), tokenizer, rows)
    model = tiny(SequenceClassifier, num_labels=2)
    model.config.id2label = {0: "x", 1: "z"}
    with pytest.raises(DataError, match="'y'"):
        evaluate(model, tokenizer, rows)


def test_span_f1_of_nameless_tags_is_refused(tokenizer):
    rows = from_rows([{"tokens": ["a", "b"], "tags": [0, 1]}])
    with pytest.raises(RequestError, match="names like B-person"):
        evaluate(tiny(TokenClassifier, num_labels=2), tokenizer, rows, ["span_f1"])
