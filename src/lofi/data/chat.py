"""Chat templates: a conversation as pieces of text, each trained or not, by position.

The prompt of turn i is the template over messages[:i] with its generation prompt; the turn is what the template over
messages[:i+1] adds to it; its end is found once, by rendering a conversation of two sentinels. Known here: templates.
Not known: ids (but for the one that ends a turn). Rejected: `{% generation %}` marks (few templates have them) and
searching for the answer's words in the rendered text (they may occur in the question).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lofi.errors import DataError

Message = dict[str, str]
_ASKED, _ANSWERED = "Zq7askedZq7", "Zq7answeredZq7"


class Piece(NamedTuple):
    """A stretch of one example: a text to encode by itself, or (text "") ids taken as they are."""

    text: str
    trained: bool = False
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the end of an assistant's turn worked out."""

    tokenizer: Any = field(repr=False, compare=False)
    text: str
    """The template's own text (jinja)."""
    kept: str = ""
    """What is trained after the assistant's content: through the stop token."""
    dropped: str = ""
    """What the template writes after the stop token; context for later turns, never trained."""
    stop_id: int | None = None
    """The special token that ends the turn; None where the template has none (EOS is then appended)."""
    stop_text: str = ""

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> ChatTemplate:
        """Work out how this template ends an assistant's turn.

        Raises  DataError: the template cannot render a question and its answer
        """
        bare = cls(tokenizer, text)
        whole = bare.render([_turn("user", _ASKED), _turn("assistant", _ANSWERED)])
        _, found, after = whole.rpartition(_ANSWERED)
        if not found:
            raise DataError(
                "the chat template leaves the assistant's words out; expected them; use a template that does"
            )
        for token, token_id in _special_tokens(tokenizer, after):
            end = after.index(token) + len(token)
            return cls(tokenizer, text, after[:end], after[end:], token_id, token)
        return cls(tokenizer, text, "", after)

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The template's text over `messages`, with the generation prompt when `ask`.

        Raises  DataError: the template refuses these messages (for example a system message it does not support)
        """
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, chat_template=self.text
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages) or "no message"
            raise DataError(
                f"the chat template refuses the roles {roles} ({error}); change the messages to what it supports"
            ) from error

    def turn(self, messages: Sequence[Message], index: int) -> tuple[str, str]:
        """What stands before assistant turn `index`, and its trained text (stop token included).

        Raises  DataError: the template rewrites the prompt once the answer is there
        """
        before = self.render(messages[:index], ask=True)
        whole = self.render(messages[: index + 1])
        added = whole[len(before) :]
        end = self.kept + self.dropped
        if not whole.startswith(before) or not added.endswith(end):
            raise DataError(
                "the chat template writes another prompt once the answer is there, so generation would not see what "
                "was trained; use a template whose generation prompt begins the assistant's turn"
            )
        return before, added[: len(added) - len(end)] + self.kept

    def pieces(self, messages: Sequence[Message], *, first: int, eos: tuple[int, ...]) -> list[Piece] | None:
        """One example in which every assistant turn from message `first` on is trained, earlier ones are context.

        None where the template rewrites earlier turns (Qwen3 drops their thoughts): those need an example a turn.
        """
        result: list[Piece] = []
        done = ""
        for index in assistant_turns(messages):
            before, answer = self.turn(messages, index)
            if not before.startswith(done):
                return None
            result += [Piece(before[len(done) :]), *self._answer(answer, eos, trained=index >= first)]
            done = before + answer
        return result

    def prompt_pieces(self, messages: Sequence[Message], *, eos: tuple[int, ...]) -> list[Piece]:
        """The conversation so far with the generation prompt, cut into pieces exactly as `pieces` cuts it."""
        asked = self.render(messages, ask=True)
        turns = assistant_turns(messages)
        earlier = self.pieces(messages, first=len(messages), eos=eos) if turns else []
        done = "".join(piece.text for piece in earlier or [])
        if earlier is None or not asked.startswith(done):
            return [Piece(asked)]
        return [*earlier, Piece(asked[len(done) :])]

    def _answer(self, answer: str, eos: tuple[int, ...], *, trained: bool) -> list[Piece]:
        return [Piece(answer, trained)] + ([] if self.stop_id is not None else [Piece("", trained, eos)])

    def head(self, messages: Sequence[Message]) -> str:
        """What the template writes before the first user's words, which truncation keeps; "" without such a place."""
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            return ""
        marked = [*messages[: users[0]], _turn("user", _ASKED)]
        before, found, _ = self.render(marked, ask=True).partition(_ASKED)
        return before if found else ""


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """The positions of the assistant's messages."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _special_tokens(tokenizer: Any, text: str) -> list[tuple[str, int]]:
    """The control tokens of `text` in order, as (written form, id)."""
    if not text:
        return []
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [(tokenizer.convert_ids_to_tokens(token_id), token_id) for token_id in ids if token_id in special]
    return [(token, token_id) for token, token_id in tokens if token in text]
