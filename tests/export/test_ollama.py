"""Modelfiles: files, template, stops and parameters, and what is said where Ollama would do otherwise than training."""

from __future__ import annotations

import copy

import pytest

from lofi.data.format import TextFormat
from lofi.errors import RequestError
from lofi.export.go_template import render
from lofi.export.ollama import modelfile, own_rendering, parameters, template_for

ASKED = [{"role": "user", "content": "Hi there"}]


def template_of(text: str) -> str:
    return text.split('TEMPLATE """')[1].split('"""')[0]


def test_a_modelfile_names_files_template_stops_and_parameters(rule):
    made = modelfile(rule, {}, model="base.gguf", adapter="adapter.gguf", context=1024)
    lines = made.text.splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in lines and 'PARAMETER stop "<|endoftext|>"' in lines
    assert lines[-3:] == ["PARAMETER num_ctx 1024", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"]
    assert render(template_of(made.text), ASKED) == rule.chat.render(ASKED, ask=True)
    assert "ADAPTER" not in modelfile(rule, {}, model="model.gguf").text


@pytest.mark.parametrize(
    ("generation", "wanted"),
    [
        ({}, {"temperature": 0, "repeat_penalty": 1.0}),
        ({"temperature": 0.7, "top_k": 5}, {"temperature": 0, "repeat_penalty": 1.0}),  # greedy: do_sample is not set
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repeat_penalty": 1.05},
        ),
        ({"do_sample": True}, {"temperature": 1.0, "repeat_penalty": 1.0}),
    ],
)
def test_ollama_draws_as_the_generation_config_says_and_not_as_it_would(generation, wanted):
    assert parameters(generation) == wanted


@pytest.fixture
def with_bos(rule) -> TextFormat:
    """lofi-tiny's rule as if its tokenizer put BOS in front, with a template that writes it too."""
    tokenizer = copy.deepcopy(rule.tokenizer)
    tokenizer.chat_template = "{{ '<|endoftext|>' }}" + rule.chat.text
    made = TextFormat.for_tokenizer(tokenizer)
    object.__setattr__(made, "head", (1,))
    return made


def test_a_bos_that_llama_cpp_adds_is_left_out_of_the_template(with_bos):
    with_it, notes = template_for(with_bos, adds_bos=False)
    assert render(with_it, ASKED).startswith("<|endoftext|><|im_start|>user")
    without, more = template_for(with_bos, adds_bos=True)
    for talk in (ASKED, [{"role": "system", "content": "S"}, *ASKED]):
        assert "<|endoftext|>" + render(without, talk) == render(with_it, talk) == with_bos.chat.render(talk, ask=True)
    assert not any("tokens" in note for note in [*notes, *more])


def test_a_bos_that_training_never_saw_is_told(rule):
    object.__setattr__(changed := copy.copy(rule), "head", (1,))
    _, notes = template_for(changed, adds_bos=True)
    assert any("puts <|endoftext|> before every prompt, which this chat template does not" in note for note in notes)


def test_the_plain_format_goes_through(rule):
    plain = TextFormat._build(rule.tokenizer, "plain", "\n", None)
    text, _ = template_for(plain, adds_bos=False)
    assert render(text, ASKED) == "Hi there\n" == own_rendering(plain)(ASKED)


def test_an_encoder_decoder_is_refused(rule):
    seq2seq = TextFormat._build(rule.tokenizer, "seq2seq", "\n", None)
    with pytest.raises(RequestError, match="Ollama serves no encoder-decoder"):
        template_for(seq2seq, adds_bos=False)


def test_a_template_given_is_taken_and_judged(rule):
    same, _ = template_for(rule, adds_bos=False)
    assert modelfile(rule, {}, model="m", template=same).notes == tuple(template_for(rule, adds_bos=False)[1])
    other = modelfile(rule, {}, model="m", template="{{ .Prompt }}")
    assert 'TEMPLATE "{{ .Prompt }}"' in other.text
    assert any("not proved to be the tokenizer's" in note for note in other.notes)
    with pytest.raises(RequestError, match="cannot quote"):
        modelfile(rule, {}, model="m", template='"""')


def test_the_same_text_in_other_tokens_is_told(rule):
    """Training encodes an answer by itself; a server encodes the blank before it and its first word as one token."""
    turn = "{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}"
    text = "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    _, notes = template_for(TextFormat._build(rule.tokenizer, "chat", "\n", text), adds_bos=False)
    told = [note for note in notes if "is cut into other tokens than in training for" in note]
    assert len(told) == 1 and "a second question" in told[0] and "a question of two lines" not in told[0]
