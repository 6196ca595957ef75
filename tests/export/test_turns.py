"""Chat templates as Ollama's: worked out from what they write, for every family's form, or refused."""

from __future__ import annotations

import jinja2
import pytest

from lofi.data.format import TextFormat
from lofi.errors import DataError, RequestError
from lofi.export.go_template import render
from lofi.export.turns import derived, plain, probes, proved, takes_system

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML with a system message of its own": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
    ),
    "Llama 3": (
        "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set c = '<|begin_of_text|>' + c %}{% endif %}"
        "{{ c }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "Llama 2": (
        "{% set system = '' %}{% set turns = messages %}{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
        "{% endif %}{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ refuse('order') }}"
        "{% endif %}{% if m['role'] == 'user' %}"
        "{{ '<s>[INST] ' + (system if loop.index0 == 0 else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' </s>' }}{% endif %}{% endfor %}"
    ),
    "Gemma": (
        "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ refuse('system') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim "
        "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "Zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "Mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}{% else %}{{ refuse('role') }}{% endif %}"
        "{% endfor %}"
    ),
    "braces": "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] }}{% endfor %}{{ '{{assistant}}' }}",
}


def rendering(template):
    def refuse(why):
        raise jinja2.TemplateError(why)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["refuse"] = refuse
    compiled = environment.from_string(template)

    def own(messages):
        try:
            return compiled.render(messages=list(messages), add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise DataError(str(error)) from error

    return own


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_familys_template_is_written_in_go_and_says_the_same(name):
    own = rendering(TEMPLATES[name])
    found = derived(own)
    assert found.takes_system == takes_system(own) == (name not in ("Gemma", "Mistral"))
    for what, messages in probes(found.takes_system).items():
        assert render(found.text, messages) == own(messages), what
    assert any("drops one silently" in note for note in found.notes) == (not found.takes_system)


@pytest.mark.parametrize(("name", "unlike"), [("ChatML", False), ("Llama 3", True)])
def test_what_is_rendered_otherwise_is_told(name, unlike):
    notes = " ".join(derived(rendering(TEMPLATES[name])).notes)
    assert ("messages that begin or end with blanks" in notes) == unlike
    assert "a system message after the first question" in notes


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("{% for m", "{{ messages | length }}{% for m"),  # counts the messages
        CHATML.replace("+ m['content'] +", "+ m['content'] + m['content'] +"),  # says everything twice
        "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}",  # forgets what was said
        CHATML.replace("m['content']", "m['content'] | upper"),  # changes the words
        "{{ refuse('always') }}",
    ],
)
def test_a_template_of_another_form_is_refused_with_what_to_do(template):
    with pytest.raises(RequestError, match=r"cannot be written as Ollama's .*--template FILE.*raw"):
        derived(rendering(template))


def test_a_template_that_differs_in_one_character_is_not_proved():
    own = rendering(CHATML)
    text = derived(own).text
    assert proved(text, own, True).text == text
    with pytest.raises(RequestError, match="for a question it would write"):
        proved(text.replace("user\n", "user "), own, True)


def test_the_plain_format_is_written_for_one_prompt_and_for_several_turns(tokenizer):
    tokenizer_eos = tokenizer.convert_ids_to_tokens(1)
    rule = TextFormat(tokenizer, "plain", "\n~ ", (), (), 1)
    go = plain("\n~ ", tokenizer_eos)
    assert render(go, [{"role": "user", "content": "Hi {{ x }}"}]) == "Hi {{ x }}\n~ "
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    talk += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    pieces = rule.prompt_pieces(talk)
    wanted = "".join(piece.text or "".join(tokenizer.convert_ids_to_tokens(list(piece.ids))) for piece in pieces)
    assert render(go, talk) == wanted
    assert wanted == f"System:\nS\n~ User:\na\n~ Assistant:\nb{tokenizer_eos}User:\nc\n~ Assistant:\n"
