"""One rule of how text becomes ids: prefixes, special tokens, stop tokens, templates, and the rule stored."""

from __future__ import annotations

import copy
import json

import pytest

from data.letters import letters
from lofi.data.format import TextFormat
from lofi.errors import DataError

PAIR = {"prompt": "Tôi là ai?", "completion": "Bạn là An."}
TALK = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
BOS_TEMPLATE = (  # writes its own BOS, trims, refuses system messages, ends turns in EOS
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.role == 'user' %}[I]{{ m.content | trim }}[/I]{% else %}{{ m.content | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
NO_STOP_TEMPLATE = (
    "{% for m in messages %}#{{ m.role }}:{{ m.content }}.{% endfor %}"
    "{% if add_generation_prompt %}#assistant:{% endif %}"
)
THINKING_TEMPLATE = (  # writes a thought into the last answer only, as Qwen3 does
    "{% for m in messages %}#{{ m.role }}:{% if loop.last and m.role == 'assistant' %}T{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}#assistant:{% endif %}"
)
REWRITING_TEMPLATE = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def trained_text(encoded, tokenizer):
    ids = [token for token, flag in zip(encoded.input_ids, encoded.trained, strict=True) if flag]
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_a_chat_template_is_used_and_only_the_answer_through_its_stop_token_is_trained(chat_tokenizer):
    rule = TextFormat.for_tokenizer(chat_tokenizer)
    encoded = rule.encode_pair(PAIR)
    assert rule.kind == "chat"
    assert rule.stop_ids == [3, 1]
    assert trained_text(encoded, chat_tokenizer) == "Bạn là An.<|im_end|>"
    whole = chat_tokenizer.decode(encoded.input_ids, skip_special_tokens=False)
    assert whole == "<|im_start|>user\nTôi là ai?<|im_end|>\n<|im_start|>assistant\nBạn là An.<|im_end|>"


@pytest.mark.parametrize("prompt", ["", "x", "ends in a space ", "ends in a line\n", "Ti\u0302ng"])
@pytest.mark.parametrize("completion", [" starts with a space", "\nline", "ing", "<|im_end|> in the words"])
def test_the_prompt_alone_is_a_prefix_of_the_trained_ids(chat_tokenizer, plain_tokenizer, prompt, completion):
    for tokenizer in (chat_tokenizer, plain_tokenizer, letters(metaspace=True)):
        rule = TextFormat.for_tokenizer(tokenizer)
        encoded = rule.encode_pair({"prompt": prompt, "completion": completion})
        asked = rule.encode_prompt(prompt)
        assert encoded.input_ids[: len(asked)] == asked
        assert not any(encoded.trained[: len(asked)])
        assert all(encoded.trained[len(asked) :])
        assert encoded.input_ids[-1] == rule.stop_ids[0]


def test_without_a_template_bos_is_what_the_tokenizer_adds_and_eos_ends(plain_tokenizer):
    spaced = letters(metaspace=True)
    rule, none = TextFormat.for_tokenizer(spaced), TextFormat.for_tokenizer(plain_tokenizer)
    ids = rule.encode_pair({"prompt": "ab", "completion": "c"}).input_ids
    assert spaced.convert_ids_to_tokens(ids) == ["<s>", "▁", "a", "b", "\n", "c", "</s>"]
    assert (rule.head, none.head) == ((1,), ())
    assert none.encode_pair(PAIR).input_ids[-1] == 1


def test_a_leading_space_of_sentencepiece_is_not_added_inside_a_text():
    spaced = letters(metaspace=True)
    rule = TextFormat.for_tokenizer(spaced)
    joined = spaced("ab\ncd", add_special_tokens=False)["input_ids"]
    assert rule.anchor == "\n"
    assert rule.encode_pair({"prompt": "ab", "completion": "cd"}).input_ids == [1, *joined, 2]
    assert rule.decode(rule.encode_pair({"prompt": "ab", "completion": "cd"}).input_ids[5:]) == "cd"


def test_a_template_that_writes_bos_gets_no_second_one_and_ends_in_eos():
    tokenizer = letters(metaspace=True, template=BOS_TEMPLATE)
    rule = TextFormat.for_tokenizer(tokenizer)
    encoded = rule.encode_pair({"prompt": " hi ", "completion": "yes"})
    assert encoded.input_ids.count(1) == 1
    assert encoded.input_ids[0] == 1
    assert rule.stop_ids == [2]
    assert trained_text(encoded, tokenizer).replace(" ", "") == "yes</s>"


def test_a_template_whose_turn_ends_in_no_special_token_gets_eos():
    tokenizer = letters(metaspace=False, template=NO_STOP_TEMPLATE)
    rule = TextFormat.for_tokenizer(tokenizer)
    encoded = rule.encode_pair({"prompt": "hi", "completion": "yes"})
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids)[-4:] == ["y", "e", "s", "</s>"]
    assert sum(encoded.trained) == 4
    talk = rule.encode_pair({"messages": TALK[1:]})
    assert [talk.input_ids[i] for i in range(len(talk.input_ids)) if talk.trained[i]].count(2) == 2
    assert talk.input_ids[: len(rule.encode_prompt(TALK[1:4]))] == rule.encode_prompt(TALK[1:4])


def test_every_assistant_turn_of_a_conversation_is_trained_with_its_stop_token(chat_tokenizer):
    rule = TextFormat.for_tokenizer(chat_tokenizer)
    encoded = rule.encode_pair({"messages": TALK})
    assert trained_text(encoded, chat_tokenizer) == "two<|im_end|>four<|im_end|>"
    whole = chat_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert chat_tokenizer.decode(encoded.input_ids, skip_special_tokens=False) == whole.removesuffix("\n")
    for upto in (2, 4):
        asked = rule.encode_prompt(TALK[:upto])
        assert encoded.input_ids[: len(asked)] == asked


def test_earlier_answers_in_a_prompt_of_messages_are_context(chat_tokenizer):
    rule = TextFormat.for_tokenizer(chat_tokenizer)
    encoded = rule.encode_pair({"prompt": TALK[:4], "completion": "four"})
    assert trained_text(encoded, chat_tokenizer) == "four<|im_end|>"
    assert encoded.input_ids == rule.encode_pair({"messages": TALK}).input_ids


def test_messages_without_a_template_are_written_as_lines(plain_tokenizer):
    rule = TextFormat.for_tokenizer(plain_tokenizer)
    encoded = rule.encode_pair({"messages": TALK})
    text = plain_tokenizer.decode(encoded.input_ids, skip_special_tokens=False)
    end = "<|endoftext|>"
    assert text == f"System:\nshort\nUser:\none\nAssistant:\ntwo{end}User:\nthree\nAssistant:\nfour{end}"
    assert trained_text(encoded, plain_tokenizer) == f"two{end}four{end}"
    asked = rule.encode_prompt(TALK[:4])
    assert encoded.input_ids[: len(asked)] == asked
    each = rule.encode_many(rule.drafts({"messages": TALK}, a_turn_each=True))
    assert [trained_text(one, plain_tokenizer) for one in each] == [f"two{end}", f"four{end}"]


def test_a_template_that_rewrites_earlier_turns_makes_an_example_a_turn():
    tokenizer = letters(metaspace=False, template=THINKING_TEMPLATE)
    rule = TextFormat.for_tokenizer(tokenizer)
    drafts = rule.drafts({"messages": TALK[1:]})
    assert len(drafts) == 2
    encoded = rule.encode_many(drafts)
    shown = ["".join(tokenizer.convert_ids_to_tokens(one.input_ids)) for one in encoded]
    assert shown == [
        "#user:one</s>#assistant:Ttwo</s>",
        "#user:one</s>#assistant:two</s>#user:three</s>#assistant:Tfour</s>",
    ]
    assert encoded[1].input_ids[: encoded[1].context] == rule.encode_prompt(TALK[1:4])
    with pytest.raises(DataError, match="one example a turn"):
        rule.encode_pair({"messages": TALK[1:]})


def test_a_template_that_rewrites_the_prompt_is_refused():
    rule = TextFormat.for_tokenizer(letters(metaspace=False, template=REWRITING_TEMPLATE))
    with pytest.raises(DataError, match="another prompt once the answer is there"):
        rule.encode_pair({"prompt": "a", "completion": "b"})


def test_a_template_that_refuses_a_role_says_which():
    rule = TextFormat.for_tokenizer(letters(metaspace=True, template=BOS_TEMPLATE))
    with pytest.raises(DataError, match=r"refuses the roles system, user.*no system"):
        rule.encode_pair({"messages": TALK})


def test_a_template_that_swallows_answers_is_refused():
    with pytest.raises(DataError, match="leaves the assistant's words out"):
        TextFormat.for_tokenizer(letters(metaspace=False, template="{{ messages[0].content }}"))


def test_an_encoder_decoder_gets_eos_on_both_sides(plain_tokenizer):
    rule = TextFormat.for_tokenizer(plain_tokenizer, seq2seq=True)
    encoded = rule.encode_pair(PAIR)
    assert encoded.input_ids[-1] == encoded.target[-1] == 1
    assert encoded.input_ids == rule.encode_prompt(PAIR["prompt"])
    assert plain_tokenizer.decode(encoded.target, skip_special_tokens=True) == PAIR["completion"]
    with pytest.raises(DataError, match="takes a text"):
        rule.encode_prompt(TALK[:2])
    with pytest.raises(DataError, match="into these two columns"):
        rule.drafts({"messages": TALK})


def test_the_tokenizers_own_frame_is_the_encoders():
    rule = TextFormat.for_tokenizer(letters(metaspace=False, frame=True), seq2seq=True)
    assert (rule.head, rule.tail) == ((3,), (4,))
    assert rule.encode_pair({"prompt": "ab", "completion": "c"}).input_ids[-1] == 4


@pytest.mark.parametrize("seq2seq", [False, True])
def test_the_rule_survives_json_and_gives_the_same_ids(chat_tokenizer, plain_tokenizer, seq2seq):
    for tokenizer in (chat_tokenizer, plain_tokenizer):
        rule = TextFormat.for_tokenizer(tokenizer, seq2seq=seq2seq, separator=" => ")
        again = TextFormat.from_dict(json.loads(json.dumps(rule.to_dict())), tokenizer)
        assert again == rule
        assert again.encode_pair(PAIR) == rule.encode_pair(PAIR)


def test_the_stored_template_wins_over_the_tokenizers(chat_tokenizer):
    stored = TextFormat.for_tokenizer(chat_tokenizer).to_dict()
    changed = copy.deepcopy(chat_tokenizer)
    changed.chat_template = "{{ messages[0].content }}"
    assert TextFormat.from_dict(stored, changed).encode_pair(PAIR) == TextFormat.for_tokenizer(
        chat_tokenizer
    ).encode_pair(PAIR)


def test_another_tokenizer_or_half_a_rule_is_refused(chat_tokenizer):
    stored = TextFormat.for_tokenizer(chat_tokenizer).to_dict()
    with pytest.raises(DataError, match=r"eos_id 2 here, 1 stored"):
        TextFormat.from_dict(stored, letters(metaspace=True))
    with pytest.raises(DataError, match="is not complete"):
        TextFormat.from_dict({"kind": "chat"}, chat_tokenizer)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = letters(metaspace=False)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        TextFormat.for_tokenizer(tokenizer)


def test_decoding_stops_at_the_first_stop_token(chat_tokenizer):
    rule = TextFormat.for_tokenizer(chat_tokenizer)
    ids = chat_tokenizer("yes<|im_end|>\nmore")["input_ids"]
    assert rule.decode(ids) == "yes"


def test_a_long_prompt_is_cut_behind_the_templates_head(chat_tokenizer):
    rule = TextFormat.for_tokenizer(chat_tokenizer)
    whole = rule.encode_prompt("word " * 50)
    cut = rule.encode_prompt("word " * 50, max_length=20)
    head = rule.head_length("word " * 50, whole)
    assert len(cut) == 20
    assert chat_tokenizer.decode(whole[:head]) == "<|im_start|>user\n"
    assert cut == whole[:head] + whole[len(whole) - (20 - head) :]
    assert rule.encode_prompt("word", max_length=20) == rule.encode_prompt("word")


def test_plain_text_is_framed_and_trained_whole():
    spaced = letters(metaspace=True)
    rule = TextFormat.for_tokenizer(spaced)
    encoded = rule.encode_many([rule.text_pieces("ab")])[0]
    assert spaced.convert_ids_to_tokens(encoded.input_ids) == ["<s>", "▁", "a", "b", "</s>"]
    assert encoded.trained == [False, True, True, True, True]


def test_the_rule_is_told_in_words(chat_tokenizer, plain_tokenizer):
    assert "<|im_end|> (id 3)" in TextFormat.for_tokenizer(chat_tokenizer).describe()
    assert "prompt + '\\n' + completion + <|endoftext|> (id 1)" in TextFormat.for_tokenizer(plain_tokenizer).describe()
    assert "decoder: completion" in TextFormat.for_tokenizer(plain_tokenizer, seq2seq=True).describe()
