"""A tokenizer as GGUF's metadata states it: tokens, types, merges or scores, special ids, chat template.

Knows the two kinds that llama.cpp has and lofi can prove: byte-level BPE ("gpt2": merges, and the name of one of a few
ways to split text before them) and BPE with byte fallback ("llama": SentencePiece's, merged by score).
llama.cpp splits text by rules that are compiled in and known by name, so a tokenizer that splits otherwise is refused;
what only touches the text around special tokens, or text that is not in composed form (NFC), is said in a note.
Rejected: tokenizer.model (the tokenizer.json in effect is what the model was trained with), and "tekken" and "gpt-4o",
whose rules llama.cpp only approximates outside ASCII.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{_WORDS}|\p{{N}}{_REST}"
LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"
_DIGITS = ("digits",)

# (the steps that split text, ignore_merges) -> llama.cpp's name for them
SPLITS: dict[tuple[tuple[tuple[Any, ...], ...], bool], str] = {
    ((("bytes", True),), False): "gpt-2",
    ((_DIGITS, ("bytes", True)), False): "smollm",
    ((("split", QWEN2), ("bytes", False)), False): "qwen2",
    ((("split", LLAMA3), ("bytes", False)), True): "llama-bpe",
    ((("split", LLAMA3), ("bytes", False)), False): "dbrx",
}
_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "</s>", "<|eom_id|>", "<eos>")
"""Tokens that llama.cpp takes for the end of an answer by their text alone."""


@dataclass(frozen=True)
class Vocabulary:
    """What is written under tokenizer.*: the metadata, and what is to be said about it."""

    values: dict[str, Any]
    """Whole keys -> value; a list of int is written as int32, of float as float32."""
    kind: str
    notes: tuple[str, ...] = ()
    strips: bool = False
    """Whether special tokens take away the spaces behind them as llama.cpp does it for models whose name is Phi-3."""
    leading: bool = True
    """Whether texts that begin with a space give the same ids, too."""
    around: bool = True
    """Whether texts with special tokens in them do."""

    def name(self, name: str) -> str:
        """A general.name by which llama.cpp treats the spaces behind special tokens as this tokenizer does."""
        named = any(mark in name.lower() for mark in ("phi-3", "phi3"))
        if self.strips:
            return name if named else f"phi-3 {name}"
        return re.sub("(?i)(phi)-?3", r"\1 3", name)


@dataclass
class _Parts:
    """The pieces of one vocabulary while they are collected."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    leading: bool = True
    around: bool = True


def vocabulary_of(tokenizer: Any, rows: int, ends: Sequence[int], where: str) -> Vocabulary:
    """The metadata of a transformers tokenizer for a model of `rows` embeddings that stops at the ids `ends`.

    Raises  ModelError where llama.cpp could not tokenize as this tokenizer does, with the reason
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(where, f"it is a {type(tokenizer).__name__} without a tokenizer.json")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise _refused(
            where, f"it is a {model['type']} tokenizer, llama.cpp's are byte-level BPE and SentencePiece BPE"
        )
    parts = _Parts()
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    parts.values["tokenizer.ggml.model"] = kind
    (_fallback if kind == "llama" else _byte_level)(state, parts, where)
    tokens, types = _tokens(state, rows, kind, where)
    parts.values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if kind == "llama":
        plain = [token for token, type_ in zip(tokens, types, strict=True) if type_ in (NORMAL, BYTE)]
        parts.values["tokenizer.ggml.scores"] = _scores(tokens, plain, model["merges"], where)
    _special(tokenizer, tokens, ends, parts, where)
    _template(tokenizer, parts)
    strips = _strips(state["added_tokens"])
    parts.around &= not any(t["lstrip"] or t["rstrip"] for t in state["added_tokens"])
    loose = [t["content"] for t in state["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if loose and not strips:
        parts.notes.append(f"llama.cpp keeps the spaces around {', '.join(loose[:3])}, this tokenizer takes them away")
    return Vocabulary(parts.values, kind, tuple(parts.notes), strips, parts.leading, parts.around)


def _strips(added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all special tokens but these three, and </s>, take away the spaces behind them, and nothing else."""
    keep = {"<unk>", "<s>", "<|endoftext|>"}
    held = {token["content"]: token for token in added}
    if not held.keys() >= keep | {"</s>"} or any(t["lstrip"] or t["single_word"] for t in added):
        return False
    return all(token["rstrip"] == (text not in keep) for text, token in held.items() if token["special"])


def _refused(where: str, reason: str) -> ModelError:
    return ModelError(
        f"the tokenizer of {where} cannot be written as GGUF: {reason}; serve the model with lofi or vLLM instead"
    )


def _byte_level(state: Mapping[str, Any], parts: _Parts, where: str) -> None:
    model = state["model"]
    normal = (state["normalizer"] or {}).get("type")
    if normal not in (None, "NFC"):
        raise _refused(where, f"it normalizes text by {normal}, llama.cpp not at all")
    if normal == "NFC":
        parts.notes.append("llama.cpp does not compose characters (NFC): give it composed text, as keyboards do")
    steps = tuple(_step(one, where) for one in _sequence(state["pre_tokenizer"]))
    name = SPLITS.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise _refused(where, f"it splits text in a way that llama.cpp has no name for that lofi proves ({steps})")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    parts.values |= {"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _sequence(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """One splitting step in the form that SPLITS is keyed by."""
    kind = step["type"]
    if kind == "Digits" and step["individual_digits"]:
        return _DIGITS
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return ("bytes", bool(step.get("use_regex", True)))
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return ("split", step["pattern"]["Regex"])
    raise _refused(where, f"it splits text by {json.dumps(dict(step), ensure_ascii=False)}, which llama.cpp does not")


def _fallback(state: Mapping[str, Any], parts: _Parts, where: str) -> None:
    """SentencePiece's BPE: spaces become U+2581, and one may stand before the text."""
    normal = state["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normal["normalizers"] if normal["type"] == "Sequence" else [normal]
    split = state["pre_tokenizer"]
    shape = [(s["type"], s.get("prepend") or (s.get("pattern") or {}).get("String"), s.get("content")) for s in steps]
    replace = ("Replace", " ", "▁")
    if shape in ([("Prepend", "▁", None), replace], [replace]) and _keeps_words(split):
        prefix = len(shape) == 2
    elif not shape and split and split["type"] == "Metaspace" and split["replacement"] == "▁" and not split["split"]:
        prefix = split["prepend_scheme"] != "never"
        if prefix:
            parts.notes.append("of a text that begins with a space llama.cpp makes one space more than this tokenizer")
            parts.leading = False
        if split["prepend_scheme"] == "first":
            parts.notes.append("llama.cpp puts a space after every special token, this tokenizer only at the beginning")
            parts.around = False
    else:
        raise _refused(where, f"it prepares text by {json.dumps([state['normalizer'], split], ensure_ascii=False)}")
    parts.values["tokenizer.ggml.pre"] = "default"
    parts.values["tokenizer.ggml.add_space_prefix"] = prefix


def _keeps_words(split: Mapping[str, Any] | None) -> bool:
    """Whether nothing is split: no step, or Gemma's, which looks for spaces after they were replaced."""
    return split is None or (split["type"] == "Split" and split["pattern"] == {"String": " "})


def _tokens(state: Mapping[str, Any], rows: int, kind: str, where: str) -> tuple[list[str], list[int]]:
    """(token by id, type by id), as many as the model has embeddings."""
    added = {token["id"]: token for token in state["added_tokens"]}
    by_id = {index: text for text, index in state["model"]["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    if max(by_id) >= rows:
        raise _refused(where, f"it has ids up to {max(by_id)}, the model only {rows} embeddings")
    if len(set(by_id.values())) != len(by_id) or "" in by_id.values():
        raise _refused(where, "two of its tokens are the same, or one is empty")
    unknown = state["model"].get("unk_token")
    tokens, types = [], []
    for index in range(rows):
        text = by_id.get(index)
        tokens.append(f"[PAD{index}]" if text is None else text)
        types.append(UNUSED if text is None else _type(text, added.get(index), kind, unknown))
    if len(set(tokens)) != rows:
        raise _refused(where, "one of its tokens is called as the filling of unused ids is, [PADn]")
    return tokens, types


def _type(text: str, added: Mapping[str, Any] | None, kind: str, unknown: str | None) -> int:
    if kind == "llama" and text == unknown:
        return UNKNOWN
    if kind == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    if added is None:
        return NORMAL
    return CONTROL if added["special"] else USER_DEFINED


def _scores(tokens: Sequence[str], plain: Sequence[str], merges: Sequence[Any], where: str) -> list[float]:
    """A score for each token such that merging by score merges as the ranks of `merges` do.

    llama.cpp merges any two neighbours whose union is a token, the best score first; so every way to make a token must
    be a merge, and the merges that make one token must follow each other. Tokens that are looked for before anything is
    merged (added ones) are not `plain`.
    """
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    known = set(plain)
    order: dict[str, int] = {}
    last = None
    for left, right in pairs:
        union = left + right
        if union != last and union in order:
            raise _refused(where, f"the merges that make {union!r} do not follow each other, as SentencePiece's do")
        last = union
        order.setdefault(union, len(order))
    for token in plain:
        for cut in range(1, len(token)):
            halves = token[:cut], token[cut:]
            if halves[0] in known and halves[1] in known and halves not in ranks:
                raise _refused(
                    where, f"it never merges {halves[0]!r} and {halves[1]!r}, which SentencePiece's BPE would"
                )
    return [-1.0 - order[token] if token in order else 0.0 for token in tokens]


def _special(tokenizer: Any, tokens: Sequence[str], ends: Sequence[int], parts: _Parts, where: str) -> None:
    """Special ids, and whether they are put around a text."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids: dict[str, Any] = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    own = ids["eos"] is not None and (ids["eos"] in ends or not ends)
    stops = list(dict.fromkeys([*([ids["eos"]] if own else []), *ends]))
    if not stops:
        raise _refused(where, "it has no end token, and llama.cpp would take token 11 for one")
    ids["eos"] = stops[0]
    ids["bos"] = stops[0] if ids["bos"] is None else ids["bos"]  # a file without one means token 11
    before, after = _around(tokenizer)
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise _refused(where, f"it puts the ids {before} before and {after} after a text, not one bos or eos")
    parts.values |= {f"tokenizer.ggml.{names[n]}_token_id": int(i) for n, i in ids.items() if i is not None}
    parts.values |= {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}
    if len(stops) > 1:
        parts.values["tokenizer.ggml.eot_token_id"] = int(stops[1])
    lost = [tokens[i] for i in stops[2:] if tokens[i] not in _ENDS]
    if lost:
        parts.notes.append(f"the model also stops at {', '.join(lost)}, which GGUF has no key for: give them as stops")
    more = [end for end in _ENDS if end in tokens and tokens.index(end) not in stops]
    if more:
        parts.notes.append(f"llama.cpp also stops at {', '.join(more)}, which it knows by name")


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids before, ids after) that encoding with special tokens adds."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]


def _template(tokenizer: Any, parts: _Parts) -> None:
    held = getattr(tokenizer, "chat_template", None)
    if isinstance(held, Mapping):
        parts.notes.append(f"of the chat templates {', '.join(held)} only default is written")
        held = held.get("default")
    if held:
        parts.values["tokenizer.chat_template"] = str(held)
