"""Golden prompts on a server: the same passes in every engine's shape, and each alteration is found where it is."""

from __future__ import annotations

import copy

import pytest

from lofi.errors import RequestError
from lofi.export.connection import Connection
from lofi.export.endpoint import Vocabulary, question_of, replay_endpoint, tolerance_of
from lofi.export.served import Served
from stub_server import Speaker, speaking


def replayed(speaker, golden, tokenizer, *, text_format=None, dtype=None):
    with speaking(speaker) as url:
        served = Served.open(Connection(url), None, "first")
        return replay_endpoint(served, golden, Vocabulary(lambda: tokenizer), text_format=text_format, dtype=dtype)


@pytest.mark.parametrize("style", ["vllm", "lofi", "plain", "llamacpp"])
@pytest.mark.parametrize("keeps_stop", [True, False])
def test_a_server_that_says_the_same_passes(golden, tokenizer, rule, style, keeps_stop):
    speaker = Speaker(golden, style, tokenizer, keeps_stop=keeps_stop)
    report = replayed(speaker, golden, tokenizer, text_format=rule.to_dict())
    assert report.differences == []
    assert report.compared == ["tokens", "log probabilities", "stops", "the chat template (2 prompts)"]
    assert report.tolerance == pytest.approx(2e-3)
    assert "says the same to 2 golden prompts" in report.lines()[0]


@pytest.mark.parametrize("style", ["ollama", "silent"])
def test_where_only_text_is_told_text_is_compared_and_that_is_said(golden, tokenizer, rule, style):
    report = replayed(Speaker(golden, style, tokenizer), golden, tokenizer, text_format=rule.to_dict())
    assert report.differences == []
    assert report.compared[:2] == ["the text alone", "stops"]
    other = tokenizer("zebra zebra zebra zebra", add_special_tokens=False)["input_ids"][:4]
    wrong = replayed(Speaker(golden, style, tokenizer, outputs={1: other}), golden, tokenizer)
    assert [(d.prompt, d.level) for d in wrong.differences] == [(1, "output")]
    assert "step 0" in wrong.differences[0].detail


@pytest.mark.parametrize("style", ["vllm", "lofi", "plain", "llamacpp"])
def test_a_logit_that_moved_is_found_at_its_step(golden, tokenizer, style):
    for by, same in ((3e-4, True), (2.1e-3, False)):
        report = replayed(Speaker(golden, style, tokenizer, shift={(1, 2, 3): by}), golden, tokenizer)
        found = [(d.prompt, d.level) for d in report.differences]
        assert found == ([] if same else [(1, "logits")])
    assert "step 2, logit of token" in report.differences[0].detail
    assert "prompt 2: logits differ" in report.failure()


def test_one_constant_on_every_logit_is_no_difference(golden, tokenizer):
    everywhere = {(p, s, r): 5.0 for p in range(2) for s in range(5) for r in range(5)}
    assert replayed(Speaker(golden, shift=everywhere), golden, tokenizer).differences == []


def test_logits_that_are_each_within_the_tolerance_must_be_closer_on_average(golden, tokenizer):
    """In bfloat16 one logit may be off by more than an adapter changes it: only the mean tells adapters apart."""
    for by, same in ((0.03, True), (0.2, False)):
        shift = {(0, step, rank): by * (-1) ** rank for step in range(4) for rank in range(5)}
        report = replayed(Speaker(golden, shift=shift), golden, tokenizer, dtype="bf16")
        assert report.tolerance > 1
        assert [(d.prompt, d.level) for d in report.differences] == ([] if same else [(0, "logits")])
    assert "logits are 0.192 off on average (at most 0.0352 are allowed)" in report.differences[0].detail
    assert 0 < report.mean < 0.2


def test_another_token_is_found_where_no_logit_is_told(golden, tokenizer):
    output = [*golden["prompts"][1]["output"][:2], 77, 78]
    report = replayed(Speaker(golden, "silent", tokenizer, outputs={1: output}), golden, tokenizer)
    assert [d.level for d in report.differences] == ["output"]
    with_ids = replayed(Speaker(golden, outputs={1: output}), golden, tokenizer)
    assert [(d.prompt, d.level) for d in with_ids.differences] == [(1, "output")]
    assert f"step 2 is token 77, was {golden['prompts'][1]['output'][2]}" in with_ids.differences[0].detail


def test_a_tie_within_the_tolerance_may_go_either_way(golden, tokenizer):
    tied = copy.deepcopy(golden)
    top = tied["prompts"][1]["top"][1]
    top[0][1] = top[1][1] + 1.5e-3
    output = [tied["prompts"][1]["output"][0], top[1][0], 5, 6]
    assert replayed(Speaker(tied, outputs={1: output}), tied, tokenizer).differences == []
    top[0][1] = top[1][1] + 2.5e-3
    assert [d.level for d in replayed(Speaker(tied, outputs={1: output}), tied, tokenizer).differences] == ["output"]


def test_a_server_that_does_not_stop_and_one_that_stops_early_are_found(golden, tokenizer):
    on = replayed(Speaker(golden, finishes={0: "length"}), golden, tokenizer)
    assert [(d.prompt, d.level) for d in on.differences] == [(0, "stop")]
    count = len(golden["prompts"][0]["output"])
    assert f"it went on after {count} tokens, when recorded it stopped" in on.differences[0].detail
    short = golden["prompts"][1]["output"][:2]
    early = replayed(Speaker(golden, outputs={1: short}, finishes={1: "stop"}), golden, tokenizer)
    assert [(d.prompt, d.level) for d in early.differences] == [(1, "stop")]
    assert "it stopped after 2 tokens, recorded are 4" in early.differences[0].detail


@pytest.mark.parametrize("style", ["vllm", "lofi", "plain", "llamacpp", "silent"])
def test_an_altered_chat_template_is_found(golden, tokenizer, rule, style):
    altered = rule.chat.text.replace("<|im_start|>'+m", "<|im_start|> '+m")
    assert altered != rule.chat.text
    speaker = Speaker(golden, style, tokenizer, template=altered)
    report = replayed(speaker, golden, tokenizer, text_format=rule.to_dict())
    assert [(d.prompt, d.level) for d in report.differences] == [(0, "template"), (1, "template")]
    told = "the server reads" if style in ("vllm", "lofi") else "as a message its output differ"
    assert told in report.differences[0].detail
    longer = rule.chat.text.replace("<|im_start|>'+m", "<|im_start|>the '+m")
    more = replayed(Speaker(golden, style, tokenizer, template=longer), golden, tokenizer, text_format=rule.to_dict())
    assert "the server reads" in more.differences[0].detail


def test_a_prompt_that_is_no_single_question_is_not_asked_as_one(golden, tokenizer, rule):
    ids = rule.encode_prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}])
    assert question_of(ids, rule) is None
    assert question_of(golden["prompts"][1]["ids"], rule) == "Count, xin chào!"
    golden["prompts"][1]["ids"] = ids
    report = replayed(Speaker(golden, "vllm", tokenizer), golden, tokenizer, text_format=rule.to_dict())
    assert report.differences == []
    assert "1 of 2 prompts were not asked as messages" in report.notes


def test_the_servers_dtype_widens_the_tolerance_and_an_unknown_one_is_refused(golden):
    assert tolerance_of(golden, None) == tolerance_of(golden, "fp32") == pytest.approx(2e-3)
    assert tolerance_of(golden, "bf16") == pytest.approx(2 * 8 * 2**-7 * 9.0)
    with pytest.raises(RequestError, match="--dtype is int3, expected what the server computes in: fp32, fp16, bf16"):
        tolerance_of(golden, "int3")


def test_a_classifiers_prompts_cannot_be_replayed_on_a_server_of_text(golden, tokenizer):
    golden["max_new_tokens"] = 0
    with pytest.raises(RequestError, match="a classifier's"):
        replayed(Speaker(golden), golden, tokenizer)


def test_a_candidate_that_fell_out_of_the_servers_list_is_held_against_its_last(golden, tokenizer):
    served = copy.deepcopy(golden)
    for record in served["prompts"]:
        record["top"] = [step[:3] for step in record["top"]]  # the server names three candidates, as some do at most
    assert replayed(Speaker(served), golden, tokenizer).differences == []
    for record in served["prompts"]:
        for step in record["top"]:
            step[1][0] = 4000  # another token stands where a likely one was
    levels = {d.level for d in replayed(Speaker(served), golden, tokenizer).differences}
    assert levels == {"logits"}
