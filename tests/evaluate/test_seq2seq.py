"""Encoder-decoders answer from the decoder's start token, greedily, to their EOS; ROUGE of answers is the peer's."""

from __future__ import annotations

import pytest
import torch

import tiny_t5
from lofi.data.format import TextFormat
from lofi.data.records import from_rows
from lofi.errors import RequestError
from lofi.evaluate.generation import generate
from lofi.evaluate.run import Options, evaluate


@pytest.fixture(scope="module")
def model():
    """A T5 that is half taught: its summaries are near the references but not equal to them."""
    taught = tiny_t5.t5()
    tiny_t5.teach(taught, steps=45, rate=1e-2)
    return taught


@pytest.fixture(scope="module")
def words():
    return tiny_t5.tokenizer()


def by_hand(model, ids: list[int], room: int) -> list[int]:
    """The likeliest token after token, without a cache, from the decoder's start."""
    said = [model.config.decoder_start_token_id]
    with torch.no_grad():
        while len(said) <= room and (len(said) == 1 or said[-1] != model.config.eos_token_id):
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([said])).logits
            said.append(int(logits[0, -1].argmax()))
    return said[1:]


@pytest.mark.parametrize("family", ["taught t5", "random bart"])
def test_answers_are_greedy_from_the_start_token_whatever_the_generation_config_says(family, model, words):
    model = model if family == "taught t5" else tiny_t5.bart()
    rule = TextFormat.for_tokenizer(words, seq2seq=True)
    prompts = [row["prompt"] for row in tiny_t5.rows(6, 8)] + ["bob : thanks ."]
    before = model.generation_config
    model.generation_config = type(before)(
        **before.to_dict() | {"num_beams": 4, "no_repeat_ngram_size": 2, "length_penalty": 2.0}
    )
    found = generate(model, words, rule, prompts, max_new_tokens=20)
    model.generation_config = before
    for prompt, answer in zip(prompts, found, strict=True):
        ids = words(prompt)["input_ids"]
        assert ids[-1] == 1 and rule.encode_prompt(prompt) == ids  # EOS ends what the encoder reads
        expected = by_hand(model, ids, 20)
        assert answer.stopped == (expected[-1] == 1)
        assert answer.ids == (expected[:-1] if answer.stopped else expected)
        assert answer.text == words.decode(answer.ids)
    assert family != "taught t5" or all(answer.stopped for answer in found[:6])


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_of_the_answers_is_rouge_scores(model, words, stem):
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score is not installed")
    rows = tiny_t5.rows(16, 9, "plain")
    options = Options(max_new_tokens=20, language="english", stem=stem)
    found = evaluate(model, words, from_rows(rows), ["rouge"], options=options)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    peer = scorer.RougeScorer(names, use_stemmer=stem)
    texts = [answer.text for answer in found.answers["base"]]
    scores = [peer.score(row["completion"], text) for row, text in zip(rows, texts, strict=True)]
    for name in names:
        mean = sum(score[name].fmeasure for score in scores) / len(scores)
        assert found.value("base", name) == pytest.approx(mean, abs=1e-12) and 0.3 < mean < 1


def test_perplexity_is_over_the_completion_and_its_end(model, words):
    rows = tiny_t5.rows(7, 10, "plain")
    rows[2]["completion"] = "bob thanks ann ."
    found = evaluate(model, words, from_rows(rows), ["perplexity"])
    total = torch.zeros((), dtype=torch.float64)
    counted = 0
    for row in rows:
        read, said = (words(row[side], return_tensors="pt").input_ids for side in ("prompt", "completion"))
        with torch.no_grad():
            total += model(input_ids=read, labels=said).loss.double() * said.numel()
        counted += said.numel()
    assert found.value("base", "perplexity") == pytest.approx(float((total / counted).exp()), rel=1e-5)


def test_a_side_longer_than_its_positions_is_one_sentence(words):
    model, rule = tiny_t5.bart(max_position_embeddings=12), TextFormat.for_tokenizer(words, seq2seq=True)
    with pytest.raises(RequestError, match="prompt 1 has 14 tokens but the model's encoder reads 12"):
        generate(model, words, rule, ["bob", "bob " * 13], max_new_tokens=3)
    with pytest.raises(RequestError, match="max_new_tokens is 13, more than the decoder's 12 positions"):
        generate(model, words, rule, ["bob"], max_new_tokens=13)
    assert len(generate(model, words, rule, ["bob " * 11], max_new_tokens=12)) == 1
    found = evaluate(model, words, from_rows(tiny_t5.rows(2, 1)), ["rouge1"], options=Options(max_new_tokens=5))
    assert any("2 of 2 prompts were too long" in note for note in found.notes)
