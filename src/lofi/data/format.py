"""TextFormat: the one rule by which prompts, completions and messages become ids, in training and ever after.

    chat      the tokenizer has a chat template: prompt = the user's message, completion = the assistant's; special
              tokens only as the template writes them (never a second BOS); trained through the end of the turn
    plain     head + ids(prompt + separator) + ids(completion) + EOS, head = what the tokenizer itself puts in front
              (BOS or nothing); messages as "Role:" lines
    seq2seq   encoder: the tokenizer's own frame around the prompt (EOS at its end); decoder: ids(completion) + EOS

Prompt and completion are encoded apart and joined as ids, so generation continues from exactly the ids that training
saw. Tokenizers that put a space before the first word of any text (SentencePiece) encode later pieces behind a newline
that is taken off again, so that a piece does not begin with a space that the text does not have. Stored with the
adapter (`to_dict`) and rebuilt by `from_dict`, which refuses a tokenizer that would give other ids. Not known here:
labels. Rejected: encoding the joined text and finding the border by characters (a token may span it, and then the
prompt of generation is not a prefix of the trained ids).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.data.chat import ChatTemplate, Message, Piece, assistant_turns
from lofi.data.truncation import cut_region
from lofi.errors import DataError

Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Encoded:
    """One example as ids; `trained[i]`: token i is to be learned; `target`: the decoder's side (seq2seq)."""

    input_ids: list[int]
    trained: list[bool]
    target: list[int] = field(default_factory=list)

    @property
    def context(self) -> int:
        """How many tokens stand before the first trained one."""
        return self.trained.index(True) if True in self.trained else len(self.trained)


@dataclass(frozen=True)
class TextFormat:
    """A tokenizer with the rule of how text is framed for it; equal when the rules are."""

    tokenizer: Any = field(repr=False, compare=False)
    kind: str
    """chat, plain or seq2seq."""
    separator: str
    """Between prompt and completion where there is no template."""
    head: tuple[int, ...]
    """Ids the tokenizer puts in front of any text."""
    tail: tuple[int, ...]
    """Ids that end the encoder's input (seq2seq)."""
    eos_id: int | None
    chat: ChatTemplate | None = None
    anchor: str = ""
    """What later pieces are encoded behind, for tokenizers that treat the start of a text specially."""

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, *, seq2seq: bool = False, separator: str = "\n") -> TextFormat:
        """The rule for this tokenizer: its chat template if it has one, else plain; seq2seq for encoder-decoders.

        Raises  DataError: the tokenizer has neither an EOS token nor a template that ends a turn in a special token
        """
        template = None if seq2seq or not tokenizer.chat_template else tokenizer.get_chat_template()
        return cls._build(tokenizer, "seq2seq" if seq2seq else "chat" if template else "plain", separator, template)

    @classmethod
    def _build(cls, tokenizer: Any, kind: str, separator: str, template: str | None) -> TextFormat:
        head, tail = frame(tokenizer)
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        chat = ChatTemplate.of(tokenizer, template) if template is not None else None
        if eos is None and (chat is None or chat.stop_id is None):
            raise DataError("the tokenizer has no EOS token, so a completion could not end; set its eos_token")
        if eos is not None and not tail:
            tail = (eos,)
        return cls(tokenizer, kind, separator, head, tail if kind == "seq2seq" else (), eos, chat, _anchor(tokenizer))

    # -- the rule, stored and told ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON: kind, template or separator, and the ids that `from_dict` holds the tokenizer to."""
        return {
            "kind": self.kind,
            "separator": self.separator,
            "template": self.chat.text if self.chat else None,
            "head": list(self.head),
            "tail": list(self.tail),
            "eos_id": self.eos_id,
            "stop_ids": self.stop_ids,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any], tokenizer: Any) -> TextFormat:
        """The stored rule with `tokenizer`; the stored template wins over the tokenizer's own.

        Raises  DataError: a key is missing, or this tokenizer gives other special ids than the stored ones
        """
        missing = {"kind", "separator", "template"} - set(stored)
        if missing or stored["kind"] not in ("chat", "plain", "seq2seq"):
            raise DataError(f"the stored text format {stored!r} is not complete; expected what to_dict wrote")
        result = cls._build(tokenizer, stored["kind"], stored["separator"], stored["template"])
        now = result.to_dict()
        keys = [key for key, value in now.items() if stored.get(key, value) != value]
        differ = [f"{key} {now[key]} here, {stored[key]} stored" for key in keys]
        if differ:
            raise DataError(
                f"this tokenizer is not the one the text format was made with ({'; '.join(differ)}); use that one"
            )
        return result

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a generated text: the trained stop token first, then EOS if it is another one."""
        chosen = [self.chat.stop_id if self.chat else None, self.eos_id]
        return list(dict.fromkeys(token_id for token_id in chosen if token_id is not None))

    def describe(self) -> str:
        """The rule in words, one line."""
        stop = f"{self._written(self.stop_ids[:1])} (id {self.stop_ids[0]})"
        if self.chat:
            unseen = f"; what the template writes after it ({self.chat.dropped!r}) is not" if self.chat.dropped else ""
            return (
                f"chat template: prompt as the user's message, completion as the assistant's; the assistant's words "
                f"through {stop} are trained{unseen}"
            )
        if self.kind == "seq2seq":
            shown = f"{self._written(self.head)} prompt {self._written(self.tail)}".strip()
            return f"encoder: {shown}; decoder: completion {stop}, all of it trained"
        head = f"{self._written(self.head)} + " if self.head else ""
        return f"plain: {head}prompt + {self.separator!r} + completion + {stop}; completion and stop token are trained"

    def _written(self, ids: Iterable[int]) -> str:
        return "".join(map(str, self.tokenizer.convert_ids_to_tokens(list(ids))))

    # -- text to ids --------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompt: Prompt, *, max_length: int | None = None) -> list[int]:
        """The ids that generation starts from: a text, or the messages so far."""
        return self.encode_prompts([prompt], max_length=max_length)[0]

    def encode_prompts(self, prompts: Sequence[Prompt], *, max_length: int | None = None) -> list[list[int]]:
        """`encode_prompt` for many in one call of the tokenizer; long ones are cut on the left behind their head."""
        encoded = [one.input_ids for one in self.encode_many([self.prompt_pieces(prompt) for prompt in prompts])]
        if max_length is None:
            return encoded
        return [self._cut(ids, prompt, max_length) for ids, prompt in zip(encoded, prompts, strict=True)]

    def _cut(self, ids: list[int], prompt: Prompt, max_length: int) -> list[int]:
        if len(ids) <= max_length:
            return ids
        start, stop = cut_region(len(ids), len(ids), max_length, self.head_length(prompt, ids)) or (0, 0)
        return ids[:start] + ids[stop:]

    def encode_pair(self, row: dict[str, Any]) -> Encoded:
        """One row of prompt + completion (or of messages that make one example) as ids.

        Raises  DataError: the template refuses the row, or needs an example for each turn (use `drafts`)
        """
        if self.kind == "seq2seq":
            source, target = self.encode_many(
                [self.prompt_pieces(row["prompt"]), self.target_pieces(row["completion"])]
            )
            return Encoded(source.input_ids, source.trained, target.input_ids)
        drafts = self.drafts(row)
        if len(drafts) != 1:
            raise DataError("the chat template rewrites earlier turns, so this conversation makes one example a turn")
        return self.encode_many(drafts)[0]

    def encode_many(self, drafts: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Drafts as ids; every piece is encoded by itself, all of them in one call of the tokenizer."""
        places = [place for draft in drafts for place in _text_places(draft)]
        found = self._encode_texts(places)
        result = []
        for draft in drafts:
            parts = [(next(found) if piece.text else list(piece.ids), piece.trained) for piece in draft]
            ids = [token_id for part, _ in parts for token_id in part]
            result.append(Encoded(ids, [trained for part, trained in parts for _ in part]))
        return result

    def _encode_texts(self, places: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
        """Ids of each (text, comes first); later ones behind the anchor, which is taken off again."""
        if not places:
            return iter(())
        encoded = self._ids([text if first else self.anchor + text for text, first in places])
        if not self.anchor:
            return iter(encoded)
        anchor = self._ids([self.anchor])[0]
        pairs = zip(encoded, places, strict=True)
        return (ids if first else self._behind(anchor, ids, text) for ids, (text, first) in pairs)

    def _behind(self, anchor: list[int], ids: list[int], text: str) -> list[int]:
        """`ids` without the anchor's; `text` by itself where the two merged into one token."""
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._ids([text])[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids as text, up to the first stop token, without special tokens."""
        stops = set(self.stop_ids)
        end = next((place for place, token_id in enumerate(ids) if int(token_id) in stops), len(ids))
        return self.tokenizer.decode(
            [int(token_id) for token_id in ids[:end]], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    # -- rows to pieces -----------------------------------------------------------------------------------------------

    def drafts(self, row: dict[str, Any], *, a_turn_each: bool = False) -> list[list[Piece]]:
        """The examples of one row as pieces: one, or one for each assistant turn.

        The latter when asked for (`a_turn_each`), and where the template rewrites earlier turns.
        Raises  DataError: the template refuses the row; messages under seq2seq
        """
        messages, first = _conversation(row)
        if self.kind == "seq2seq":
            raise DataError("an encoder-decoder trains prompt + completion; turn messages into these two columns")
        if self.chat is None and isinstance(row.get("prompt"), str):
            return [[*self.prompt_pieces(row["prompt"]), *self.target_pieces(row["completion"])]]
        joined = None if a_turn_each else self._pieces(messages, first)
        if joined is not None:
            return [joined]
        turns = [index for index in assistant_turns(messages) if index >= first]
        return [[*self.prompt_pieces(messages[:index]), *self._turn(messages, index)] for index in turns]

    def prompt_pieces(self, prompt: Prompt) -> list[Piece]:
        """The pieces of a prompt, as generation and training both encode it."""
        if self.kind == "seq2seq":
            if not isinstance(prompt, str):
                raise DataError("an encoder-decoder takes a text as its prompt, not messages; give a text")
            return [Piece("", ids=self.head), Piece(prompt), Piece("", ids=self.tail)]
        if self.chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            return self.chat.prompt_pieces(messages, eos=self._eos)
        if isinstance(prompt, str):
            return [Piece("", ids=self.head), Piece(prompt + self.separator)]
        return [*self._plain_pieces(prompt, first=len(prompt)), Piece(self._plain_tail(prompt))]

    def target_pieces(self, completion: str) -> list[Piece]:
        """The trained side without a template: the completion and its EOS (under seq2seq with the decoder's head)."""
        head = [Piece("", True, self.head)] if self.kind == "seq2seq" and self.head else []
        return [*head, Piece(completion, True), Piece("", True, self._eos)]

    def text_pieces(self, text: str) -> list[Piece]:
        """Plain text as pieces: head, text and EOS."""
        return [Piece("", ids=self.head), Piece(text, True), Piece("", True, self._eos)]

    def head_length(self, prompt: Prompt, ids: Sequence[int]) -> int:
        """How many of a prompt's first ids truncation keeps: BOS, or the template up to the first user's words."""
        if self.chat is None:
            return len(self.head)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        head = self.encode_many([[Piece(self.chat.head(messages))]])[0].input_ids
        return next((place for place, pair in enumerate(zip(head, ids, strict=False)) if pair[0] != pair[1]), len(head))

    @property
    def _eos(self) -> tuple[int, ...]:
        return () if self.eos_id is None else (self.eos_id,)

    def _pieces(self, messages: Sequence[Message], first: int) -> list[Piece] | None:
        if self.chat:
            return self.chat.pieces(messages, first=first, eos=self._eos)
        return self._plain_pieces(messages, first=first)

    def _turn(self, messages: Sequence[Message], index: int) -> list[Piece]:
        if self.chat is None:
            return self.target_pieces(messages[index]["content"])
        stop = [] if self.chat.stop_id is not None else [Piece("", True, self._eos)]
        return [Piece(self.chat.turn(messages, index)[1], True), *stop]

    def _plain_pieces(self, messages: Sequence[Message], first: int) -> list[Piece]:
        """Messages without a template: "User:\\n<words><separator>Assistant:\\n<words>EOS", the next turn behind it."""
        result = [Piece("", ids=self.head)]
        previous = 0
        for index in assistant_turns(messages):
            trained = index >= first
            result.append(Piece(self._plain_tail(messages[previous:index])))
            result += [Piece(messages[index]["content"], trained), Piece("", trained, self._eos)]
            previous = index + 1
        return result

    def _plain_tail(self, messages: Sequence[Message]) -> str:
        """The messages after the last assistant turn as lines, and the line that asks the assistant."""
        last = max(assistant_turns(messages), default=-1)
        lines = [f"{turn['role'].capitalize()}:\n{turn['content']}{self.separator}" for turn in messages[last + 1 :]]
        return "".join(lines) + "Assistant:\n"


def _conversation(row: dict[str, Any]) -> tuple[list[Message], int]:
    """A row as messages, and the first message whose answer is trained."""
    if "completion" not in row:
        return list(row["messages"]), 0
    prompt = row["prompt"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*asked, {"role": "assistant", "content": row["completion"]}], len(asked)


def _text_places(draft: Sequence[Piece]) -> list[tuple[str, bool]]:
    """The texts of a draft, each with whether it is the first."""
    texts = [piece.text for piece in draft if piece.text]
    return [(text, place == 0) for place, text in enumerate(texts)]


def _anchor(tokenizer: Any) -> str:
    """A newline where this tokenizer encodes the first word of a text unlike the first word of a line."""
    alone, newline, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "\n", "\na"))
    return "\n" if behind[: len(newline)] == newline and behind[len(newline) :] != alone else ""


def frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before and after any text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    return (), ()
