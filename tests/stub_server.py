"""A small HTTP server on 127.0.0.1 that answers golden prompts as vLLM, llama.cpp, Ollama or a plain OpenAI server do.

What it says comes from the golden record itself, so it is right unless a test alters it. It refuses what the server it
plays refuses.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NORMALISER = 3.25  # log of the sum of exponentials: what every log probability is below its logit


@dataclass
class Speaker:
    """What a stub says, and how."""

    golden: dict[str, Any]
    style: str = "vllm"
    """vllm (ids everywhere), lofi (ids, candidates by text), plain (texts alone), llamacpp, ollama or silent (no
    log probabilities, no ids)."""
    tokenizer: Any = None
    template: str | None = None
    models: tuple[str, ...] = ("base", "first")
    shift: dict[tuple[int, int, int], float] = field(default_factory=dict)
    """(prompt, step, candidate) -> what is added to its logit."""
    outputs: dict[int, list[int]] = field(default_factory=dict)
    """Prompt -> another answer."""
    finishes: dict[int, str] = field(default_factory=dict)
    keeps_stop: bool = True
    """Whether the stop token is among the answer's tokens."""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of one POST."""
        self.asked.append((path, body))
        if body.get("model") not in self.models:
            return 404, {"error": {"message": f"no model {body.get('model')}"}}
        if path == "/v1/chat/completions":
            ids = self.tokenizer(
                self.tokenizer.apply_chat_template(
                    body["messages"], tokenize=False, add_generation_prompt=True, chat_template=self.template
                ),
                add_special_tokens=False,
            )["input_ids"]
            return 200, self.reply(ids, body, chat=True)
        prompt = body["prompt"]
        if self.style in ("plain", "silent", "ollama") and not isinstance(prompt, str):
            return 400, {"error": {"message": "prompt must be a string"}}
        if self.style == "silent" and "logprobs" in body:
            return 422, {"detail": "logprobs are not supported"}
        if self.style != "vllm" and "return_tokens_as_token_ids" in body:
            return 400, {"error": {"message": "return_tokens_as_token_ids is no field"}}
        if self.style == "plain" and "return_token_ids" in body:
            return 400, {"error": {"message": "unknown field return_token_ids"}}
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        return 200, self.reply(ids, body, chat=False)

    def reply(self, ids: list[int], body: dict[str, Any], *, chat: bool) -> Any:
        """The answer to a prompt; an unknown prompt is answered with nothing."""
        place = next((i for i, record in enumerate(self.golden["prompts"]) if record["ids"] == ids), None)
        record = self.golden["prompts"][place] if place is not None else {"output": [], "top": [], "stopped": False}
        output = self.outputs.get(place, record["output"])
        finish = self.finishes.get(place, "stop" if record["stopped"] else "length")
        told = output if self.keeps_stop or finish != "stop" else output[:-1]
        tops = [
            [(token, value + self.shift.get((place, step, rank), 0.0)) for rank, (token, value) in enumerate(top)]
            for step, top in enumerate(record["top"])
        ]
        spoken = output[:-1] if finish == "stop" else output
        text = self.tokenizer.decode(spoken, skip_special_tokens=True) if self.tokenizer else ""
        if self.style == "ollama" and not chat:
            return {"model": body["model"], "response": text, "done": True, "done_reason": finish}
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        answer: dict[str, Any] = {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}
        if self.style in ("vllm", "lofi") and body.get("return_token_ids"):
            choice["token_ids"] = told
            (answer if chat else choice)["prompt_token_ids"] = ids
        if body.get("logprobs") and self.style not in ("silent", "ollama"):
            choice["logprobs"] = self.logprobs(told, tops, chat=chat)
        return answer

    def logprobs(self, told: list[int], tops: Any, *, chat: bool) -> Any:
        """Log probabilities in the server's own shape."""
        steps = list(zip(told, tops, strict=False))
        if self.style == "llamacpp" or chat:
            return {
                "content": [
                    self.entry(token, dict(top).get(token, -99.0))
                    | {"top_logprobs": [self.entry(one, value) for one, value in top]}
                    for token, top in steps
                ]
            }
        named = (lambda token: f"token_id:{token}") if self.style == "vllm" else (lambda t: self.tokenizer.decode([t]))
        return {
            "tokens": [named(token) for token, _ in steps],
            "token_logprobs": [dict(top).get(token, -99.0) - NORMALISER for token, top in steps],
            "top_logprobs": [{named(one): value - NORMALISER for one, value in top} for _, top in steps],
        }

    def entry(self, token: int, value: float) -> dict[str, Any]:
        """One token of the newer shape."""
        ids = {"id": token} if self.style == "llamacpp" else {}
        text = self.tokenizer.decode([token]) if self.tokenizer else f"token_id:{token}"
        return {"token": text, "logprob": value - NORMALISER, **ids}

    def listing(self) -> Any:
        """GET /v1/models."""
        owner = {"vllm": "vllm", "llamacpp": "llamacpp", "ollama": "library"}.get(self.style, "someone")
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in self.models]}


@contextlib.contextmanager
def serving(respond: Any) -> Iterator[str]:
    """The address of a server that answers with `respond(method, path, body) -> (status, text or JSON, headers)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            status, value, headers = respond(self.command, self.path, body)
            if status is None:  # drop the connection
                return
            raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            for key, text in headers.items():
                self.send_header(key, text)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have gone
                self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def speaking(speaker: Speaker) -> Iterator[str]:
    """The address of a server that is `speaker`."""

    def respond(method: str, path: str, body: Any) -> Any:
        if method == "GET":
            return (200, speaker.listing(), {}) if path == "/v1/models" else (404, {}, {})
        if speaker.style == "ollama" and path == "/api/generate":
            path = "/v1/completions"
        return (*speaker.answer(path, body), {})

    with serving(respond) as url:
        yield url
