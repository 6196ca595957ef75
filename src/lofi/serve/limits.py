"""What the server takes and for how long: one frozen value that `lofi serve` fills from its flags.

Knows numbers and tokens, no HTTP and no engine. The numbers without a flag are there so that one client cannot take the
memory or the time of all others; a request over one of them is answered with its name and value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MOST_LOGPROBS = 20  # OpenAI's own bound on top_logprobs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the app guards itself."""

    api_key: str | None = field(default=None, repr=False)
    """Bearer token that every /v1 route asks for; None asks for none."""
    admin_token: str | None = field(default=None, repr=False)
    """Bearer token of loading and unloading; None switches both off."""
    adapter_folder: Path | None = None
    """The only folder that adapters are loaded from over HTTP; None switches loading off."""
    hosts: frozenset[str] | None = LOOPBACK
    """Host names that a request may be addressed to (against DNS rebinding); None takes any."""
    request_timeout: float | None = 600.0
    """Seconds an answer may take, waiting included."""
    drain_seconds: float = 30.0
    """Seconds that running answers have to finish once the server was told to stop."""
    body_bytes: int = 4 << 20
    """The largest request body."""
    body_seconds: float = 30.0
    """Seconds a client has to send its body."""
    answers: int = 64
    """The most answers to one request: prompts times n."""
    stops: int = 16
    """The most stop texts of a request."""
    stop_characters: int = 512
    biases: int = 1024
    """The most entries of logit_bias."""
    messages: int = 2048
    chat_tokens: int = 4096
    """The most tokens of a chat answer whose request does not say how long it may be."""
    adapter_bytes: int = 8 << 30
    """The largest adapter folder loaded over HTTP."""
    adapter_files: int = 64
    adapter_tensors: int = 20_000

    @property
    def can_load(self) -> bool:
        """Whether adapters can be loaded over HTTP at all."""
        return self.admin_token is not None and self.adapter_folder is not None
