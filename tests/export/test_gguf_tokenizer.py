"""A tokenizer in a GGUF file gives the ids that the exported one gives, or is refused with the reason."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lofi.errors import ModelError, ProofError
from lofi.export.gguf_file import Read, read, write
from lofi.export.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary_of
from lofi.export.gguf_tokenizer_proof import TEXTS, prove_tokenizer
from lofi.models.load import load_tokenizer
from tiny_gguf import ROWS, SPLITS, byte_level, fallback

pytest.importorskip("gguf", reason='the gguf package is missing; pip install "lofi[export]"')


def proved(tokenizer, rows=ROWS, ends=(1,)):
    words = vocabulary_of(tokenizer, rows, list(ends), "the model")
    prove_tokenizer(Read(words.values, {}), tokenizer, words, "m.gguf")
    return words


@pytest.mark.parametrize("split", SPLITS)
def test_each_way_to_split_text_has_its_name_and_gives_the_same_ids(split):
    words = proved(byte_level(split))
    assert (words.kind, words.values["tokenizer.ggml.pre"]) == ("gpt2", split)
    assert words.values["tokenizer.ggml.token_type"].count(UNUSED) == ROWS - 300


def with_values(tokenizer, rows: int, change):
    """What is written of a tokenizer, with some of it changed, and the proof of that."""
    words = vocabulary_of(tokenizer, rows, [1], "the model")
    prove_tokenizer(Read(words.values | change(words.values), {}), tokenizer, words, "m.gguf")


@pytest.mark.parametrize(("split", "wrong"), [("llama-bpe", "smollm"), ("llama-bpe", "qwen2"), ("gpt-2", "smollm")])
def test_a_wrong_name_of_the_splitting_is_noticed(split, wrong):
    with pytest.raises(ProofError, match=r"llama\.cpp would read"):
        with_values(byte_level(split), ROWS, lambda values: {"tokenizer.ggml.pre": wrong})


def test_a_lost_merge_and_a_bos_too_many_are_noticed():
    with pytest.raises(ProofError, match="would read 'Hello world'"):
        with_values(byte_level(), ROWS, lambda values: {"tokenizer.ggml.add_bos_token": True})
    with pytest.raises(ProofError, match="would read"):
        with_values(byte_level(), ROWS, lambda v: {"tokenizer.ggml.merges": v["tokenizer.ggml.merges"][1:]})


def test_transformers_reads_the_tokenizer_from_the_file(tmp_path):
    tokenizer = byte_level()
    values = {"general.architecture": "llama", **proved(tokenizer).values}
    write(tmp_path / "m.gguf", "llama", values, [], lambda name: None)
    assert read(tmp_path / "m.gguf").values["tokenizer.ggml.merges"] == values["tokenizer.ggml.merges"]
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_shipped_tokenizer_splits_digits_and_wants_composed_text(lofi_tiny):
    words = proved(load_tokenizer(lofi_tiny), 8192)
    assert words.values["tokenizer.ggml.pre"] == "smollm" and any("NFC" in note for note in words.notes)
    assert any("also stops at <|im_end|>" in note for note in words.notes)


@pytest.mark.parametrize(("prefix", "space"), [("prepend", True), ("none", False), ("always", True), ("first", True)])
def test_byte_fallback_is_written_with_scores_that_merge_as_its_merges_do(prefix, space):
    tokenizer = fallback(prefix=prefix)
    words = proved(tokenizer, len(tokenizer), ends=(2,))
    assert words.kind == "llama" and words.values["tokenizer.ggml.add_space_prefix"] == space
    assert words.values["tokenizer.ggml.add_bos_token"] and not words.values["tokenizer.ggml.add_eos_token"]
    types = words.values["tokenizer.ggml.token_type"]
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and types.count(BYTE) == 256
    assert ("special token" in " ".join(words.notes)) == (prefix == "first")


def test_added_tokens_are_found_before_anything_is_merged():
    tokenizer = fallback()
    tokenizer.add_tokens([AddedToken("ab", normalized=False), AddedToken("ll", normalized=False)])
    words = proved(tokenizer, len(tokenizer), ends=(2,))
    tokens, types = (words.values[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert [tokens[i] for i, type_ in enumerate(types) if type_ == USER_DEFINED] == ["ll", "ab"]


def test_scores_in_another_order_are_noticed():
    def reversed_order(values):
        return {"tokenizer.ggml.scores": [-20 - s if s < 0 else 0.0 for s in values["tokenizer.ggml.scores"]]}

    with pytest.raises(ProofError, match="would read 'Hello world'"):
        with_values(fallback(), 320, reversed_order)


def test_a_real_sentencepiece_vocabulary_is_proved(shared):
    tokenizer = load_tokenizer(shared / "models" / "stories260k")
    assert proved(tokenizer, 512).values["tokenizer.ggml.unknown_token_id"] == 0


@pytest.mark.parametrize(
    ("merges", "said"),
    [
        ([("▁", "h"), ("e", "l"), ("l", "l"), ("▁h", "e"), ("el", "l")], "never merges 'e' and 'll'"),
        ([("h", "el"), ("e", "l"), ("he", "l")], "do not follow each other"),
    ],
)
def test_merges_that_are_not_sentencepieces_are_refused(merges, said):
    tokens = {token for pair in merges for token in (*pair, "".join(pair))}
    vocabulary = {t: i for i, t in enumerate(["<unk>", "</s>", *sorted({*tokens, *"▁helo"})])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    built.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ModelError, match=said):
        vocabulary_of(tokenizer, 64, [1], "the model")


def changed(**parts) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with parts of its backend replaced."""
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": normalizers.Lowercase()}, "normalizes text by Lowercase, llama.cpp not at all"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(True)}, "add_prefix_space"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "splits text by"),
        (
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated")])},
            "which llama.cpp does not",
        ),
        ({"model": models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")}, "WordPiece tokenizer"),
    ],
)
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(parts, said):
    with pytest.raises(ModelError, match=said):
        vocabulary_of(changed(**parts), ROWS, [1], "the model")


def test_more_ids_than_embeddings_and_a_missing_end_are_refused():
    with pytest.raises(ModelError, match="ids up to 299, the model only 200 embeddings"):
        vocabulary_of(byte_level(), 200, [1], "the model")
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(ModelError, match=r"no end token, and llama\.cpp would take token 11"):
        vocabulary_of(endless, ROWS, [], "the model")


def test_a_tokenizer_that_puts_two_ids_before_a_text_is_refused():
    twice = processors.TemplateProcessing(
        single="<|pad|> <|endoftext|> $A", special_tokens=[("<|pad|>", 0), ("<|endoftext|>", 1)]
    )
    with pytest.raises(ModelError, match=r"puts the ids \[0, 1\] before and \[\] after"):
        vocabulary_of(changed(post_processor=twice), ROWS, [1], "the model")


def test_several_ends_are_written_as_far_as_there_are_keys():
    values = vocabulary_of(byte_level(), ROWS, [5, 1, 7], "the model")
    assert values.values["tokenizer.ggml.eos_token_id"] == 1 and values.values["tokenizer.ggml.eot_token_id"] == 5
    assert any("stops at" in note and "give them as stops" in note for note in values.notes)


def test_models_called_phi_3_are_named_as_their_special_tokens_behave():
    plain = vocabulary_of(byte_level(), ROWS, [1], "the model")
    assert plain.name("my-Phi-3-mini") == "my-Phi 3-mini" and plain.name("tuned phi3") == "tuned phi 3"
    backend = fallback().backend_tokenizer
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    backend.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True, normalized=False)])
    backend.add_tokens([AddedToken("tool", normalized=False)])
    state = json.loads(backend.to_str())
    next(token for token in state["added_tokens"] if token["content"] == "</s>")["rstrip"] = True
    built = Tokenizer.from_str(json.dumps(state))
    phi = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|endoftext|>", bos_token="<s>", unk_token="<unk>")
    words = vocabulary_of(phi, len(phi), [phi.eos_token_id], "the model")
    assert words.name("mini") == "phi-3 mini" and not any("spaces around" in note for note in words.notes)
    assert USER_DEFINED in words.values["tokenizer.ggml.token_type"]
