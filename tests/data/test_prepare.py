"""Records to examples: what is trained, what is cut, what is refused, and that the report counts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lofi.data
from data.letters import letters
from lofi.data.format import TextFormat
from lofi.data.labels import IGNORED
from lofi.data.prepare import prepare
from lofi.data.records import from_rows, load_records
from lofi.errors import DataError

PAIRS = [{"prompt": "one two three " * 9, "completion": "four."}, {"prompt": "x", "completion": "a longer answer"}]
TALK = [
    {"role": "user", "content": "one " * 12},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three " * 12},
    {"role": "assistant", "content": "four"},
]


def trained(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != IGNORED], skip_special_tokens=False)


def test_the_answer_and_its_end_are_trained_even_where_pad_is_eos(plain_tokenizer):
    assert plain_tokenizer.pad_token_id == plain_tokenizer.eos_token_id
    prepared = prepare(from_rows(PAIRS), plain_tokenizer)
    assert [trained(example, plain_tokenizer) for example in prepared.examples] == [
        "four.<|endoftext|>",
        "a longer answer<|endoftext|>",
    ]
    assert (prepared.report.eos_trained, prepared.report.completions) == (2, 2)
    assert "EOS trained in 2/2" in prepared.report.lines()


def test_an_answer_that_occurs_in_the_question_is_trained_once(chat_tokenizer):
    prepared = prepare(from_rows([{"prompt": "say yes: yes", "completion": "yes"}]), chat_tokenizer)
    assert trained(prepared.examples[0], chat_tokenizer) == "yes<|im_end|>"


def test_truncation_cuts_the_prompt_and_is_counted(chat_tokenizer):
    whole = prepare(from_rows(PAIRS), chat_tokenizer)
    prepared = prepare(from_rows(PAIRS), chat_tokenizer, max_length=24)
    first, full = prepared.examples[0], whole.examples[0]
    assert len(first) == 24
    assert trained(first, chat_tokenizer) == trained(full, chat_tokenizer)
    assert [*first.input_ids[: first.cut_at], *first.cut, *first.input_ids[first.cut_at :]] == full.input_ids
    assert chat_tokenizer.decode(first.input_ids).startswith("<|im_start|>user\n")
    assert prepared.report.truncated_rows == 1
    assert prepared.report.tokens_cut == len(full) - 24
    assert prepared.report.trained_tokens == whole.report.trained_tokens


def test_an_answer_that_does_not_fit_is_an_error_with_its_line(chat_tokenizer, write):
    path = write("x.jsonl", PAIRS)
    needed = sum(label != IGNORED for label in prepare(load_records(path), chat_tokenizer).examples[1].labels) + 1
    with pytest.raises(DataError, match=rf"x.jsonl:2: the completion needs max_length {needed} at least"):
        prepare(load_records(path), chat_tokenizer, max_length=needed - 1)
    assert len(prepare(load_records(path), chat_tokenizer, max_length=needed).examples[1]) == needed


def test_a_conversation_that_does_not_fit_becomes_an_example_for_each_answer(chat_tokenizer):
    records = from_rows([{"messages": TALK}])
    whole = prepare(records, chat_tokenizer)
    prepared = prepare(records, chat_tokenizer, max_length=40)
    assert len(whole.examples) == 1
    assert [trained(example, chat_tokenizer) for example in prepared.examples] == ["two<|im_end|>", "four<|im_end|>"]
    assert prepared.report.trained_tokens == whole.report.trained_tokens
    assert prepared.report.completions == prepared.report.eos_trained == 2
    assert (prepared.report.split_rows, prepared.report.split_examples) == (1, 2)
    assert all(len(example) <= 40 for example in prepared.examples)


def test_long_texts_become_windows_that_lose_nothing():
    tokenizer = letters(metaspace=True)
    records = from_rows([{"text": "abcdefghijklmnop"}, {"text": "q"}])
    prepared = prepare(records, tokenizer, max_length=7)
    whole = prepare(records, tokenizer)
    told = [label for example in prepared.examples if example.row == 0 for label in example.labels if label != IGNORED]
    assert told == whole.examples[0].input_ids[1:]
    assert prepared.report.trained_tokens == whole.report.trained_tokens
    assert (prepared.report.split_rows, prepared.report.split_examples) == (1, 3)
    assert prepared.report.eos_trained == prepared.report.completions == 2


def test_an_encoder_decoder_reads_the_prompt_and_trains_the_completion(plain_tokenizer):
    prepared = prepare(from_rows(PAIRS), plain_tokenizer, task="SEQ_2_SEQ_LM", max_length=8)
    first = prepared.examples[0]
    assert first.task == "SEQ_2_SEQ_LM"
    assert (len(first), first.input_ids[-1], first.labels[-1]) == (8, 1, 1)
    assert trained(first, plain_tokenizer) == "four.<|endoftext|>"
    with pytest.raises(DataError, match="row 2: the completion needs max_length"):
        prepare(from_rows(PAIRS), plain_tokenizer, task="SEQ_2_SEQ_LM", max_length=3)
    with pytest.raises(DataError, match="holds messages rows, which do not serve"):
        prepare(from_rows([{"messages": TALK}]), plain_tokenizer, task="SEQ_2_SEQ_LM")


def test_text_that_becomes_no_token_is_refused():
    tokenizer = letters(metaspace=False)
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("z", "")
    with pytest.raises(DataError, match="row 1: the completion becomes no token"):
        prepare(from_rows([{"prompt": "a", "completion": "zz"}]), tokenizer)
    with pytest.raises(DataError, match="row 1: the text becomes no token"):
        prepare(from_rows([{"text": "zz"}]), tokenizer)


def test_the_stop_token_in_an_answers_own_words_is_counted(chat_tokenizer):
    prepared = prepare(from_rows([{"prompt": "a", "completion": "b<|im_end|>c"}]), chat_tokenizer)
    assert prepared.report.stop_in_text == 1
    assert any("contain the stop token" in line for line in prepared.report.lines())


@pytest.mark.parametrize(
    ("row", "task", "says"),
    [
        (PAIRS[0], "SEQ_CLS", "holds sft rows"),
        (PAIRS[0], "text", "holds sft rows"),
        ({"text": "a"}, "sft", "holds text rows"),
        ({"text": "a"}, "TOKEN_CLS", "holds text rows"),
        (PAIRS[0], "CAUSAL", "nearest 'CAUSAL_LM'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, None, "{completion: chosen}"),
    ],
)
def test_rows_that_do_not_serve_the_task_are_refused(chat_tokenizer, row, task, says):
    with pytest.raises(DataError) as caught:
        prepare(from_rows([row]), chat_tokenizer, task=task)
    assert says in str(caught.value)


def test_labelled_text_may_be_read_as_text(chat_tokenizer):
    assert (
        prepare(from_rows([{"text": "a b", "label": 0}]), chat_tokenizer, task="text").examples[0].task == "CAUSAL_LM"
    )


def test_a_given_rule_is_used_and_kept(chat_tokenizer):
    rule = TextFormat.for_tokenizer(chat_tokenizer)
    assert prepare(from_rows(PAIRS), chat_tokenizer, text_format=rule).text_format is rule


def test_max_length_leaves_room_to_learn(chat_tokenizer):
    with pytest.raises(DataError, match="max_length is 1"):
        prepare(from_rows(PAIRS), chat_tokenizer, max_length=1)


def test_a_template_that_refuses_a_row_names_the_row():
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = letters(metaspace=False, template=template + "{{ m.content }}{{ eos_token }}{% endfor %}")
    talk = [{"role": "system", "content": "s"}, *TALK[:2]]
    with pytest.raises(DataError, match=r"made:row 2: the chat template refuses the roles system"):
        prepare(from_rows([{"messages": TALK[:2]}, {"messages": talk}], source="made"), tokenizer)


def test_every_token_is_trained_context_or_cut(chat_tokenizer):
    report = prepare(from_rows(PAIRS), chat_tokenizer, max_length=24).report
    whole = prepare(from_rows(PAIRS), chat_tokenizer).report
    total = whole.trained_tokens + whole.context_tokens
    assert report.trained_tokens + report.context_tokens + report.tokens_cut == total
    assert report.to_dict()["tokens_cut"] == report.tokens_cut


def test_percentiles_are_nearest_ranks():
    from lofi.data.report import DataReport

    report = DataReport("x", "sft", "rule")
    report.note_lengths(list(range(1, 201)))
    assert (report.percentiles, report.longest) == ({"p50": 100, "p90": 180, "p99": 198}, 200)


@pytest.mark.parametrize("model", ["lofi-tiny", "stories260k"])
@pytest.mark.parametrize("name", ["instruct_1100", "vi_diacritics", "e2e_nlg"])
def test_shared_pairs_train_every_completion_to_its_end(shared, model, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    records = load_records(shared / "data" / name, limit=300)
    prepared = prepare(records, tokenizer, max_length=512)
    assert prepared.report.eos_trained == prepared.report.completions == 300
    rule = prepared.text_format
    for example, row in zip(prepared.examples, records.rows, strict=True):
        answer = [label for label in example.labels if label != IGNORED]
        assert example.input_ids[: example.prompt_length] == rule.encode_prompt(row["prompt"])
        assert answer[-1] == rule.stop_ids[0]
        same = tokenizer.decode(tokenizer(row["completion"], add_special_tokens=False)["input_ids"])  # NFC, unk
        assert rule.decode(answer).strip() == same.strip()


def test_shared_dialogues_and_quotes_are_cut_and_split(shared, chat_tokenizer):
    columns = {"prompt": "dialogue", "completion": "summary"}
    talks = prepare(
        load_records(shared / "data" / "dialogsum", columns=columns, limit=200), chat_tokenizer, max_length=256
    )
    quotes = prepare(
        load_records(shared / "data" / "english_quotes", columns={"text": "quote"}, limit=300),
        chat_tokenizer,
        max_length=64,
    )
    assert talks.report.truncated_rows > 0
    assert talks.report.eos_trained == 200
    assert quotes.report.split_rows > 0
    assert quotes.report.eos_trained == 300


def test_the_room_is_imported_without_torch_or_transformers():
    names = sorted(path.stem for path in Path(lofi.data.__file__).parent.glob("*.py") if path.stem != "batches")
    code = "import sys\n" + "\n".join(f"import lofi.data.{name}" for name in names)
    code += "\nsys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
