"""Golden prompts asked of a server: what it says differently than the adapter did when it was saved, prompt by prompt.

Two questions are asked for every prompt. As token ids: are weights and adapter the same (tokens, log probabilities,
stop)? As a message, where the prompt is one question in the stored chat template: does the server write the same prompt
from it? Servers tell log probabilities; differences of two of them are differences of two logits, which are compared:
each within the tolerance that the record allows, and all of a prompt on average within a sixteenth of it. In bfloat16
the first alone would let another adapter pass: one logit may be off by more than most adapters change it, the mean not.
Knows not  HTTP (connection.py) nor the shapes of answers (served.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.data.format import TextFormat, frame
from lofi.errors import DataError, RequestError
from lofi.export.connection import Refused
from lofi.export.served import UNANSWERABLE, Reply, Served, Token
from lofi.files.golden import Difference, mean_allowed, mean_fault

_EPS = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
_ROUNDINGS = 8  # as many roundings of the largest logit as golden prompts allow a model that is loaded here
_MARK = "Zq7askedZq7"


@dataclass
class Vocabulary:
    """The tokens' texts, from a tokenizer that is loaded when the first server tells no ids."""

    load: Callable[[], Any]
    _tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself."""
        if self._tokenizer is None:
            self._tokenizer = self.load()
        return self._tokenizer

    def prompt(self, ids: Sequence[int]) -> str:
        """A prompt as text, without what the tokenizer, and so a server, puts before any text by itself."""
        head = list(frame(self.tokenizer)[0])
        return self.tokenizer.decode(list(ids)[len(head) if list(ids)[: len(head)] == head else 0 :])

    def texts(self, token: int) -> set[str]:
        """What a server may call a token that tells no id: its text, or the tokenizer's own name for it."""
        name, text = str(self.tokenizer.convert_ids_to_tokens(token)), self.tokenizer.decode([token])
        return {name} | (set() if "\ufffd" in text else {text})

    def same(self, said: Token, token: int) -> bool:
        """Whether what a server said is this token; a token without a text of its own cannot be told apart."""
        if isinstance(said, int):
            return said == token
        return said in self.texts(token) or "\ufffd" in said or said.startswith("bytes:")

    def find(self, top: Mapping[Token, float], token: int) -> float | None:
        """A token's log probability in one step of a server's answer; None where it is not there."""
        if token in top:
            return top[token]
        if all(isinstance(key, int) for key in top):
            return None
        return next((top[text] for text in self.texts(token) if text in top), None)

    def tells(self, top: Mapping[Token, float], token: int) -> bool:
        """Whether one step of a server's answer could name this token: by its id, or by a text that is its own."""
        return all(isinstance(key, int) for key in top) or "\ufffd" not in self.tokenizer.decode([token])

    def continuation(self, ids: Sequence[int], output: Sequence[int]) -> str:
        """The text that `output` adds to a prompt, without special tokens."""
        before = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return self.tokenizer.decode([*ids, *output], skip_special_tokens=True)[len(before) :]


@dataclass(frozen=True)
class EndpointReport:
    """What a server said to the golden prompts of an adapter."""

    url: str
    model: str
    prompts: int
    tolerance: float
    compared: Sequence[str]
    differences: Sequence[Difference]
    notes: Sequence[str] = field(default_factory=list)
    mean: float | None = None
    """By how much a logit is off on average, over every prompt; None where the server tells no log probabilities."""
    dtype: str | None = None
    """What the server was said to compute in."""

    def lines(self) -> list[str]:
        """The report in words."""
        same = f"{self.model} at {self.url} says the same to {self.prompts} golden prompts: {', '.join(self.compared)}"
        if self.mean is None:
            return [same, *self.notes]
        allowed = f"{mean_allowed(self.tolerance / 2):.2g} are allowed, and {self.tolerance:.2g} between any two"
        return [same, f"logits are {self.mean:.2g} off on average ({allowed})", *self.notes]

    def failure(self) -> str:
        """One sentence for a replay that differs."""
        more = f" and {len(self.differences) - 5} more" if len(self.differences) > 5 else ""
        said = "; ".join(str(difference) for difference in self.differences[:5])
        finer = all(one.level == "logits" for one in self.differences) and not self.dtype
        hint = "; if the server computes in bf16 or fp16, say so with --dtype" if finer else ""
        return f"{self.model} at {self.url} does not say what the adapter said when it was saved: {said}{more}{hint}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "endpoint": self.url,
            "model": self.model,
            "same": not self.differences,
            "prompts": self.prompts,
            "tolerance": self.tolerance,
            "mean_logit_error": self.mean,
            "compared": list(self.compared),
            "differences": [vars(difference) for difference in self.differences],
            "notes": list(self.notes),
        }


def tolerance_of(golden: Mapping[str, Any], dtype: str | None) -> float:
    """How far differences of two logits may be off: twice what one may be, as recorded or as `dtype` rounds.

    Raises  RequestError for a dtype that is not known
    """
    if dtype is not None and dtype not in _EPS:
        raise RequestError(f"--dtype is {dtype}, expected what the server computes in: {', '.join(_EPS)}")
    steps = [step for record in golden["prompts"] for step in record["top"]]
    largest = max((abs(value) for step in steps for _, value in step), default=1.0)
    wider = _ROUNDINGS * _EPS[dtype] * largest if dtype else 0.0
    return 2 * max(float(golden["tolerance"]), wider)


def replay_endpoint(
    served: Served,
    golden: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    text_format: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> EndpointReport:
    """Ask a server the golden prompts of an adapter, greedily; see the module's docstring for what is compared.

    Where two recorded candidates were closer than the tolerance, either continuation is accepted and the comparison of
    that prompt ends. `text_format` is the adapter's stored one; without it, or where it has no chat template, nothing
    is asked as messages. `dtype` is what the server computes in, where it is coarser than what was recorded.
    Raises  RequestError for a classifier's golden prompts; what Served raises
    """
    if not golden["max_new_tokens"]:
        raise RequestError("these golden prompts hold no text (a classifier's): no server of text can replay them")
    judge = _Judge(tolerance_of(golden, dtype), vocabulary)
    chat = (text_format or {}).get("kind") == "chat"
    rule = TextFormat.from_dict(dict(text_format or {}), vocabulary.tokenizer) if chat else None
    found, questions = [], 0
    for place, record in enumerate(golden["prompts"]):
        difference = judge.compare(record, _completed(served, record, golden, vocabulary))
        question = question_of(record["ids"], rule) if rule is not None else None
        if question is not None and difference is None:
            questions += 1
            reply = served.chat(question, golden["max_new_tokens"], len(record["top"][0]))
            difference = judge.compare(record, reply, asked="as a message")
        found += [Difference(place, *difference)] if difference is not None else []
    count = len(golden["prompts"])
    notes = [*served.notes, *judge.notes, *_template_notes(rule, questions, count)]
    compared = [*judge.compared, *([f"the chat template ({questions} prompts)"] if questions else [])]
    what = served.connection.root, served.model, count, judge.tolerance, compared, found, notes
    return EndpointReport(*what, sum(judge.every) / len(judge.every) if judge.every else None, dtype)


def _completed(served: Served, record: Mapping[str, Any], golden: Mapping[str, Any], vocabulary: Vocabulary) -> Reply:
    asked = golden["max_new_tokens"], len(record["top"][0])
    if served.takes_ids:
        try:
            return served.complete(record["ids"], None, *asked)
        except Refused as error:
            if error.status not in UNANSWERABLE:
                raise
    # the tokenizer is loaded only for a server that needs it
    return served.complete(record["ids"], vocabulary.prompt(record["ids"]), *asked)


def question_of(ids: Sequence[int], rule: TextFormat) -> str | None:
    """The user's words of a prompt that is one question in the rule's chat template; None where it is anything else."""
    assert rule.chat is not None
    before, _, after = rule.chat.render([{"role": "user", "content": _MARK}], ask=True).partition(_MARK)
    text = rule.tokenizer.decode(list(ids))
    if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
        return None
    question = text[len(before) : len(text) - len(after)]
    try:
        return question if rule.encode_prompt([{"role": "user", "content": question}]) == list(ids) else None
    except DataError:
        return None


def _template_notes(rule: TextFormat | None, questions: int, count: int) -> list[str]:
    if rule is None:
        return []
    missed = f"{count - questions} of {count} prompts were not asked as messages"
    return [missed] if questions < count else []


@dataclass
class _Judge:
    """Compares answers with the record, and remembers what there was to compare."""

    tolerance: float
    vocabulary: Vocabulary
    compared: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    every: list[float] = field(default_factory=list)
    """By how much each logit that was compared is off, once the mean of its step is taken away."""

    def compare(self, record: Mapping[str, Any], reply: Reply, *, asked: str | None = None) -> tuple[str, str] | None:
        """What is wrong with a reply, as (level, detail), at the first step where it differs."""
        wrong = _prompt_fault(record, reply)
        if wrong is not None:
            return ("template" if asked else "ids"), wrong
        self._saw("tokens" if reply.tokens is not None else "the text alone")
        if reply.tops:
            self._saw("log probabilities")
        self._saw("stops")
        before = len(self.every)
        found = self._tokens(record, reply) if reply.tokens is not None else self._text(record, reply)
        found = found or self._mean_fault(self.every[before:])
        # as ids it said the same, so what differs is what the server makes of a message
        return ("template", f"{asked} its {found[0]} differ: {found[1]}") if found and asked else found

    def _saw(self, what: str) -> None:
        if what not in self.compared:
            self.compared.append(what)

    def _mean_fault(self, offs: Sequence[float]) -> tuple[str, str] | None:
        fault = mean_fault(offs, self.tolerance / 2)  # what one logit may be off; a difference of two, twice that
        return ("logits", fault) if fault else None

    def _tokens(self, record: Mapping[str, Any], reply: Reply) -> tuple[str, str] | None:
        said, output = reply.tokens or (), record["output"]
        for step, then in enumerate(record["top"]):
            if step < len(reply.tops) and (gap := self._gap(then, reply.tops[step])):
                return "logits", f"step {step}, {gap} (tolerance {self.tolerance:.3g})"
            if step >= len(output) or (step < len(said) and self.vocabulary.same(said[step], output[step])):
                continue
            if step == len(said) and step == len(output) - 1 and record["stopped"] and reply.finish == "stop":
                return None  # some servers do not count the stop token among the answer's
            if self._tie(then):
                return None
            if step >= len(said):
                return "stop", f"it stopped after {len(said)} tokens, recorded are {len(output)}"
            return "output", f"step {step} is token {said[step]!r}, was {output[step]}"
        return _stop_fault(record, reply.finish, len(said))

    def _text(self, record: Mapping[str, Any], reply: Reply) -> tuple[str, str] | None:
        """The same on text: the first token whose text the answer does not have."""
        ids, output = record["ids"], record["output"]
        whole = self.vocabulary.continuation(ids, output).rstrip("\ufffd")
        if whole.strip() == reply.text.rstrip("\ufffd").strip():
            return _stop_fault(record, reply.finish, len(output))
        for step in range(len(output)):
            begun = self.vocabulary.continuation(ids, output[: step + 1]).rstrip("\ufffd")
            if not reply.text.lstrip().startswith(begun.strip()):
                if self._tie(record["top"][step]):
                    return None
                return "output", f"the text is {reply.text[:60]!r}, was {whole[:60]!r} (first other at step {step})"
        if len(record["top"]) > len(output) and self._tie(record["top"][len(output)]):
            return None
        return "output", f"the text is {reply.text[:60]!r}, was {whole[:60]!r}"

    def _tie(self, then: Sequence[Any]) -> bool:
        """Whether the two likeliest candidates were closer than the tolerance tells apart."""
        return len(then) > 1 and then[0][1] - then[1][1] <= self.tolerance

    def _gap(self, then: Sequence[Any], now: Mapping[Token, float]) -> str | None:
        """What is wrong with one step: recorded candidates against the server's, both relative to one of them."""
        then = [(int(token), value) for token, value in then if self.vocabulary.tells(now, int(token))]
        told = {token: value for token, _ in then if (value := self.vocabulary.find(now, token)) is not None}
        if not then:
            return None
        if not told:
            return f"none of the {len(then)} likeliest tokens recorded is among the {len(now)} that the server names"
        anchor, base = next((token, value) for token, value in then if token in told)
        floor = min(now.values())
        self._measure(then, told, floor)
        for token, value in then:
            wanted, seen = value - base, told.get(token)
            # a candidate that the server does not name is at most as likely as the last that it does
            off = abs(wanted - (seen - told[anchor])) if seen is not None else wanted - (floor - told[anchor])
            if off > self.tolerance:
                is_now = f"{seen - told[anchor]:+.4g}" if seen is not None else f"below {floor - told[anchor]:+.4g}"
                return f"logit of token {token} against that of {anchor} is {is_now}, was {wanted:+.4g}"
        return None

    def _measure(self, then: Sequence[tuple[int, float]], told: Mapping[int, float], floor: float) -> None:
        """Keep by how much the logits of one step are off; what they have in common is the normaliser's."""
        level = sum(value - told[token] for token, value in then if token in told) / len(told)
        for token, value in then:
            # one that the server does not name has at most the floor's
            off = abs(value - told[token] - level) if token in told else max(value - floor - level, 0.0)
            self.every.append(off)


def _prompt_fault(record: Mapping[str, Any], reply: Reply) -> str | None:
    """How the prompt that the server read is not the one recorded."""
    was = record["ids"]
    if reply.prompt_ids is not None:
        if list(reply.prompt_ids) == was:
            return None
        same = next((i for i, (x, y) in enumerate(zip(reply.prompt_ids, was, strict=False)) if x != y), None)
        where = min(len(was), len(reply.prompt_ids)) if same is None else same
        return f"the server reads {len(reply.prompt_ids)} tokens, recorded are {len(was)}, first other at {where}"
    if reply.prompt_tokens is not None and reply.prompt_tokens != len(was):
        return f"the server reads {reply.prompt_tokens} tokens, recorded are {len(was)}"
    return None


def _stop_fault(record: Mapping[str, Any], finish: str | None, said: int) -> tuple[str, str] | None:
    stopped = finish == "stop"
    if stopped == record["stopped"]:
        return None
    now, before = ("stopped" if ended else "went on" for ended in (stopped, record["stopped"]))
    return "stop", f"it {now} after {said} tokens, when recorded it {before}"
