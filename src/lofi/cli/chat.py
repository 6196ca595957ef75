"""`lofi chat`: talk to a model, changing adapters between the turns."""

from __future__ import annotations

import difflib
import sys
from typing import Any

from lofi.cli import flags
from lofi.cli.generate import Temperature, TopP, sampling_of
from lofi.cli.output import speaking

HELP = "/adapter NAME (or base) changes who speaks · /new starts over · /exit leaves"


def chat(
    model: flags.Model,
    adapter: flags.Adapters = None,
    max_new_tokens: flags.MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: flags.Seed = 0,
    dtype: flags.Dtype = "auto",
    quantization: flags.Quantization = None,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Talk to a model; answers appear as they are written.

    The first adapter given speaks. /adapter NAME changes the speaker, /adapter base is the model alone, /new starts
    over, /exit leaves. Under --json the whole conversation is printed as one object at the end.

    \b
    Example:
      lofi chat --model ./Qwen3-0.6B --adapter poet=runs/poet --adapter runs/first
    """
    named = flags.named_adapters(adapter)
    with speaking(as_json) as out:
        import torch

        from lofi.cli.opening import open_model, writers

        opened = open_model(model, named, dtype=dtype, device=device, quantization=quantization, seed=seed)
        torch.manual_seed(seed)
        talk = Talk(opened, writers(opened)[0], max_new_tokens, sampling_of(temperature, top_p, seed))
        out.note(f"{talk.who or 'base'} speaks; {HELP}")
        converse(talk, out)
        out.answer({"messages": talk.said})


def converse(talk: Talk, out: Any) -> None:
    """Read lines until /exit or the end of the input; a line is a turn or a command."""
    while (line := _line(talk.who)) is not None:
        if line.startswith("/"):
            if line.strip() == "/exit":
                return
            out.note(talk.command(line))
        elif line.strip():
            talk.turn(line, out.note)


def _line(who: str | None) -> str | None:
    try:
        if sys.stdin.isatty():
            return input("you> ")
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except EOFError:
        return None


class Talk:
    """A conversation: its turns so far, and who speaks next."""

    def __init__(self, opened: Any, who: str | None, room: int, sampling: Any) -> None:
        self.opened, self.who, self.room, self.sampling = opened, who, room, sampling
        self.messages: list[dict[str, str]] = []  # what the model sees
        self.said: list[dict[str, str]] = []  # everything, with who said it

    def command(self, line: str) -> str:
        """Carry out a command and say what happened."""
        word, _, name = line.strip().partition(" ")
        if word == "/new":
            self.messages = []
            return "a new conversation"
        if word == "/adapter":
            return self._change(name.strip())
        return HELP

    def _change(self, name: str) -> str:
        known = ["base", *self.opened.adapters]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"here: {', '.join(known)}"
            return f"there is no adapter {name!r}; {hint}"
        self.who = None if name == "base" else name
        return f"{name} speaks"

    def turn(self, text: str, note: Any) -> str:
        """Answer one turn, streaming it to stdout; without room, the oldest turns are forgotten with a word."""
        from lofi.adapters.switch import adapters_off, using
        from lofi.cli.streaming import stream

        self.messages.append({"role": "user", "content": text})
        ids = self._ids(note)
        with using(self.opened.model, self.who) if self.who else adapters_off(self.opened.model):
            answer = stream(self.opened, self.opened.format_of(self.who), ids, self.room, self.sampling)
        self.messages.append({"role": "assistant", "content": answer})
        who = self.who or "base"
        self.said += [{"role": "user", "content": text}, {"role": "assistant", "content": answer, "who": who}]
        return answer

    def _ids(self, note: Any) -> list[int]:
        """The prompt's token ids, without the oldest turns where the context is too short for all of them."""
        from lofi.evaluate.generation import check_room, context_length

        rule, context = self.opened.format_of(self.who), context_length(self.opened.model)
        if rule.kind == "seq2seq":
            self.messages = self.messages[-1:]  # an encoder-decoder takes one text
            return rule.encode_prompt(self.messages[0]["content"])
        ids = rule.encode_prompt(self._prompt())
        while context is not None and len(ids) + self.room > context and len(self.messages) > 2:
            self.messages = self.messages[2:]
            note("(the oldest turn no longer fits the model's context and is forgotten)")
            ids = rule.encode_prompt(self._prompt())
        check_room(self.opened.model, [len(ids)], self.room)
        return ids

    def _prompt(self) -> Any:
        """A first turn as plain text, in the way single prompts were trained; then the messages."""
        return self.messages[0]["content"] if len(self.messages) == 1 else self.messages
