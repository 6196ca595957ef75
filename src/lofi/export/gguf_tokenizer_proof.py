"""Texts tokenized by llama.cpp's rules from a GGUF file alone, compared with the tokenizer that was exported.

The rules are written here a second time, from llama.cpp's side and by the names in the file, so that a wrong name, a
lost merge or a wrong score is noticed. Not simulated: llama.cpp's own code (the tests ask it, where it is installed).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lofi.errors import ProofError
from lofi.export.gguf_file import Read
from lofi.export.gguf_tokenizer import CONTROL, USER_DEFINED, Vocabulary

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CASELESS}|\p{{N}}{{1,3}}{_TAIL}"
_PATTERNS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (rf"{_CASELESS}|\p{{N}}{_TAIL}",),
    "llama-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
}
TEXTS = (
    "Hello world",
    "The quick brown fox jumps over the lazy dog.",
    "It's what they've said: we'll see, I'm sure you'd agree. IT'S FINE",
    "Tôi yêu tiếng Việt, thành phố Hồ Chí Minh năm 2024.",
    "3.14159 + 2718281828 = 12345678901 (1,000,000)",
    "  leading, trailing and   inner   spaces  ",
    "line one\nline two\n\n\nline five\r\n\ttabbed\t\tcell",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # ok\n",
    "emoji 👩‍👩‍👧 🎉 and 汉字 한국어 العربية हिन्दी ไทย",
    "https://example.org/a_b?c=d&e=%20f#g <b>tag</b> $x$ @me ~!^&*()_+|",
    "a",
    " ",
    "\n",
    "ÀÉÎÕÜ ßœ ﬁ ½ ² ™ … — “quoted” ‘single’",
)


def prove_tokenizer(read: Read, tokenizer: Any, words: Vocabulary, where: str) -> None:
    """Raise ProofError naming the first text that the file's tokenizer splits differently from `tokenizer`.

    Texts that begin with a space, or hold special tokens, are left out where `words` says that they differ.
    """
    encode = _fallback(read.values) if words.kind == "llama" else _byte_level(read.values)
    values = read.values
    before = [values["tokenizer.ggml.bos_token_id"]] if values["tokenizer.ggml.add_bos_token"] else []
    after = [values["tokenizer.ggml.eos_token_id"]] if values["tokenizer.ggml.add_eos_token"] else []
    texts = [text for text in TEXTS if words.leading or not text.startswith(" ")]
    for text in (*texts, *(_marked(values) if words.around else ())):
        theirs = list(tokenizer(text)["input_ids"])
        ours = [*before, *encode(text), *after]
        if ours != theirs:
            raise ProofError(
                f"{where}: llama.cpp would read {text!r} as the ids {ours[:12]}, the tokenizer as {theirs[:12]}; "
                "nothing was put into place, serve the model with lofi or vLLM instead"
            )


def _marked(values: Mapping[str, Any]) -> list[str]:
    """A text around each of the first special tokens."""
    return [f"before{token}after 12" for token in _special(values)[:8]]


def _special(values: Mapping[str, Any]) -> list[str]:
    pairs = zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True)
    return [token for token, type_ in pairs if type_ in (CONTROL, USER_DEFINED)]


def _byte_level(values: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    tokens = values["tokenizer.ggml.tokens"]
    name = values["tokenizer.ggml.pre"]
    merges = [tuple(pair.split(" ", 1)) for pair in values["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name == "llama-bpe"))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[name]]
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _special(values)])
    return lambda text: made.encode(text, add_special_tokens=False).ids


def _fallback(values: Mapping[str, Any]) -> Any:
    """SentencePiece's BPE: the two neighbours whose union scores best become one, until no union is a token."""
    ids = {token: index for index, token in enumerate(values["tokenizer.ggml.tokens"])}
    scores = values["tokenizer.ggml.scores"]
    unknown = values.get("tokenizer.ggml.unknown_token_id", 0)

    special = sorted(_special(values), key=len, reverse=True)
    lead = " " if values["tokenizer.ggml.add_space_prefix"] else ""

    def encode(text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
        return [i for part in parts if part for i in ([ids[part]] if part in special else merged(lead + part))]

    def merged(text: str) -> list[int]:
        pieces = list(text.replace(" ", "▁"))
        while True:
            unions = [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]
            if not unions:
                break
            at = -max(unions)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return [index for piece in pieces for index in _ids(piece, ids, unknown)]

    return encode


def _ids(piece: str, ids: Mapping[str, int], unknown: int) -> list[int]:
    if piece in ids:
        return [ids[piece]]
    return [ids.get(f"<0x{byte:02X}>", unknown) for byte in piece.encode()]
