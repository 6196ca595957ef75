"""Answers as they are written: OpenAI's chunks as server-sent events.

Chat: a delta with the role, deltas with text, one with finish_reason, with `stream_options.include_usage` one with the
usage, then [DONE]. What is the same in every chunk is escaped once a request; a chunk of plain text is two joined
strings. An answer that cannot be finished ends its stream with an error event, which OpenAI's clients raise. Tokens of
a fast model are written several at a time, each in its own event; the first and the last never wait.
Rejected: StreamingResponse (learns of a lost client only when it writes, and a queued request does not write) and
pydantic objects a chunk.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from lofi.serve.answers import FINISHED, chat_logprobs, frame, text_logprobs, usage
from lofi.serve.asking import Batch
from lofi.serve.delivery import Answers, Choice
from lofi.serve.faults import ended
from lofi.serve.request import Piece
from lofi.serve.spelling import Spelling

DONE = b"data: [DONE]\n\n"
QUIET = b": waiting\n\n"
QUIET_SECONDS = 15.0  # proxies close connections that say nothing for a minute
PACE_SECONDS = (
    0.02  # between two writes to a stream: no eye sees more, and each write takes time from the engine
)
write = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Chunks:
    """Writes the events of one request."""

    def __init__(self, batch: Batch, answers: Answers, spelling: Spelling) -> None:
        self.batch, self.answers, self.spelling = batch, answers, spelling
        self.chat = batch.kind == "chat"
        top = frame(batch, "chat.completion.chunk" if self.chat else "text_completion")
        self._head = "data: " + write(top)[:-1] + ',"choices":['
        self._tail = ',"usage":null}\n\n' if batch.include_usage else "}\n\n"
        self._plain = {choice.index: self._around(choice.index) for choice in answers.choices}
        self._offsets = [0] * len(answers.choices)
        self._begun: set[int] = set()

    def _around(self, index: int) -> tuple[str, str]:
        """What stands before and after the text of a chunk that holds nothing else."""
        opening = f'{{"index":{index},' + ('"delta":{"content":' if self.chat else '"text":')
        closing = ("}" if self.chat else "") + ',"logprobs":null,"finish_reason":null}]'
        return self._head + opening, closing + self._tail

    def first(self) -> bytes:
        """The role, once an answer."""
        if not self.chat:
            return b""
        found = []
        for choice in self.answers.choices:
            told: dict[str, Any] = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
            ids = {"prompt_token_ids": list(self.batch.prompts[0])} if self.batch.token_ids else {}
            found.append(self._event(told | {"logprobs": None, "finish_reason": None}, ids))
        return "".join(found).encode()

    def piece(self, choice: Choice, piece: Piece) -> str:
        """The chunk of one piece; "" where it has nothing to say."""
        if piece.finish is not None and piece.finish not in FINISHED:
            return "data: " + write(ended(piece.finish, piece.error).body()) + "\n\n"
        if piece.finish is None and not piece.logprobs and not self.batch.token_ids:
            if not piece.text:
                return ""
            before, after = self._plain[choice.index]
            return before + write(piece.text) + after
        return self._full(choice, piece)

    def _full(self, choice: Choice, piece: Piece) -> str:
        """A chunk with log probabilities, token ids or the end."""
        told: dict[str, Any] = {"index": choice.index}
        if self.chat:
            told["delta"] = {"content": piece.text} if piece.text or piece.finish is None else {}
        else:
            told["text"] = piece.text
        told["logprobs"] = self._logprobs(choice, piece)
        told["finish_reason"] = piece.finish
        if self.batch.token_ids:
            told["token_ids"] = list(piece.tokens)
            if not self.chat and choice.index not in self._begun:
                told["prompt_token_ids"] = list(choice.asked.prompt)
            self._begun.add(choice.index)
        return self._event(told)

    def _logprobs(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        if choice.asked.logprobs is None or not piece.logprobs:
            return None
        if self.chat:
            return chat_logprobs(piece.logprobs, self.spelling)
        told, self._offsets[choice.index] = text_logprobs(piece.logprobs, self.spelling, self._offsets[choice.index])
        return told

    def _event(self, choice: dict[str, Any], beside: dict[str, Any] | None = None) -> str:
        extra = "," + write(beside)[1:-1] if beside else ""
        return f"{self._head}{write(choice)}]{extra}{self._tail}"

    def last(self) -> bytes:
        """Usage where it was asked for and every answer came to its end, and the end of the stream."""
        if self.batch.include_usage and all(choice.finish in FINISHED for choice in self.answers.choices):
            event = f'{self._head}],"usage":{write(usage(self.batch, self.answers))}}}\n\n'
            return event.encode() + DONE
        return DONE

    async def events(self) -> AsyncIterator[bytes]:
        """Everything, as it comes; a comment where nothing came for a while."""
        if head := self.first():
            yield head
        while True:
            try:
                async with asyncio.timeout(QUIET_SECONDS):
                    news = await self.answers.news()
            except TimeoutError:
                yield QUIET
                continue
            if not news:
                break
            if text := "".join([self.piece(choice, piece) for choice, piece in news]):
                yield text.encode()
                self.answers.pause(PACE_SECONDS)
        yield self.last()


class EventStream(Response):
    """Sends the events and watches, all the while, whether the client is still there."""

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks) -> None:
        super().__init__(status_code=200, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks = chunks

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI; the answers that a lost client leaves behind are taken back."""
        watch = asyncio.ensure_future(gone(receive))
        watch.add_done_callback(lambda _: self.chunks.answers.end("cancelled", "the client left"))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for events in self.chunks.events():
                await send({"type": "http.response.body", "body": events, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self.chunks.answers.cancel()


async def gone(receive: Any) -> None:
    """Returns when the client has left; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
