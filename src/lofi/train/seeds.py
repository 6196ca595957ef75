"""One seed, several independent streams of chance: what is drawn for one purpose never shifts another.

Rejected: one global stream. There an extra draw while a head is initialised changes the order of the data.
"""

from __future__ import annotations

import hashlib
import random

PURPOSES = ("init", "data", "dropout", "golden")


def stream(seed: int, purpose: str) -> int:
    """The seed of one purpose: the first 31 bits of SHA-256("lofi:<purpose>:<seed>")."""
    assert purpose in PURPOSES, purpose
    digest = hashlib.sha256(f"lofi:{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def seed_everything(value: int) -> None:
    """Seed Python, numpy and torch (every device) with one number."""
    import numpy
    import torch

    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
