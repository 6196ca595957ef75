"""A tokenizer, a golden record made of nothing but numbers, and the text format it was recorded with."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tokenizer(lofi_tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lofi_tiny)


@pytest.fixture(scope="session")
def rule(tokenizer):
    from lofi.data.format import TextFormat

    return TextFormat.for_tokenizer(tokenizer)


@pytest.fixture
def golden(tokenizer, rule) -> dict:
    """Two questions: one answer that stops, one that is cut after four tokens; five candidates a step."""

    def words(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    stop = rule.stop_ids[0]
    answers = [([*words("The end")[:3], stop], True), (words("One two three four five")[:4], False)]
    others = [token for token in words("red green blue black white house tree") if token > 20][:4]
    prompts = []
    for place, (output, stopped) in enumerate(answers):
        ids = rule.encode_prompt([{"role": "user", "content": ("Tell me.", "Count, xin chào!")[place]}])
        top = [
            [[token, 9.0 - 1.5 * rank - 0.1 * step] for rank, token in enumerate([leader, *others])]
            for step, leader in enumerate(output)
        ]
        prompts.append({"ids": ids, "output": output, "stopped": stopped, "top": top})
    return {
        "format": 1,
        "dtype": "fp32",
        "stop_ids": rule.stop_ids,
        "max_new_tokens": 4,
        "tolerance": 1e-3,
        "prompts": prompts,
    }
