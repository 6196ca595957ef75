"""Hashes change when what they stand for changes, and not otherwise."""

from __future__ import annotations

import hashlib

from transformers import AutoTokenizer

from lofi.files.provenance import hash_code, hash_file, hash_files, hash_template, hash_tokenizer, versions


def test_a_file_hash_is_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 999999)
    assert hash_file(tmp_path / "f") == hashlib.sha256(b"abc" * 999999).hexdigest()
    assert hash_files([tmp_path / "f"]) == {str(tmp_path / "f"): hash_file(tmp_path / "f")}


def test_using_a_tokenizer_does_not_change_its_hash_and_a_new_token_does(lofi_tiny):
    tokenizer = AutoTokenizer.from_pretrained(lofi_tiny)
    before = hash_tokenizer(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    assert hash_tokenizer(tokenizer) == before == hash_tokenizer(AutoTokenizer.from_pretrained(lofi_tiny))
    tokenizer.add_tokens(["<new>"])
    assert hash_tokenizer(tokenizer) != before


def test_the_template_hash_follows_the_template(lofi_tiny):
    tokenizer = AutoTokenizer.from_pretrained(lofi_tiny)
    before = hash_template(tokenizer)
    tokenizer.chat_template += " "
    assert before is not None and hash_template(tokenizer) != before
    tokenizer.chat_template = None
    assert hash_template(tokenizer) is None


def test_the_code_hash_is_stable_and_versions_name_what_is_installed():
    assert hash_code() == hash_code() and len(hash_code()) == 64
    assert {"python", "torch", "transformers"} <= versions().keys()
