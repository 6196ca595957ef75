"""Whether a model computes under the row cache what it computes without any: asked of it before the engine serves it.

Three rows of random tokens of unlike lengths, their first part read in chunks, the rest decoded one token a step side
by side; every decoded token's logits against the plain forward's. This catches what no config says: attention that
takes no mask a row, positions counted from the mask, layers that keep a state of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lofi.errors import LofiError, ModelError, ProofError
from lofi.models.probe import random_ids, undisturbed
from lofi.serve.cache import BLOCK, RowCache
from lofi.serve.forward import Forward

_READ = (11, 1, 6)
"""Tokens of each row that are read as its prompt."""
_DECODED = 5
_CHUNK = 4
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative to the spread of the logits. Float32 shows 1e-6 or so, a mask that is off by one 1e-2 and more."""
_NARROW_TOLERANCE = 0.1
"""For bf16 and float16, whose rounding differs with the shape of a batch."""


class Proved(NamedTuple):
    """What the proof found out beside that it held."""

    bytes_per_token: int
    """Keys and values of one position in all layers."""
    deviation: float
    """The largest deviation of a token's logits, relative to their spread."""


def prove(model: Any) -> Proved:
    """Hold the row cache against the plain forward.

    Raises  ModelError where the model cannot run over the cache, ProofError where it gives other logits
    """
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        raise ModelError(
            f"{type(model).__name__} keeps more than the keys and values of its tokens (an encoder, or a state): the "
            "engine serves decoders of attention layers; use lofi generate"
        )
    ids = random_ids(model, rows=len(_READ), length=max(_READ) + _DECODED, seed=0)
    with torch.inference_mode(), undisturbed(model):
        cache = RowCache(rows=len(_READ), tokens=len(_READ) * BLOCK)
        forward = Forward(model, cache)
        expected = [
            model(input_ids=row[None, : read + _DECODED]).logits[0, read:] for row, read in zip(ids, _READ, strict=True)
        ]
        found = _decoded(model, forward, ids.tolist())
    if not cache.layers:
        raise ModelError(f"{type(model).__name__} keeps no keys and values in the cache it is given: use lofi generate")
    worst = max(_deviation(got, want) for got, want in zip(found, expected, strict=True))
    if not worst <= _TOLERANCE.get(model.dtype, _NARROW_TOLERANCE):
        raise ProofError(
            f"{type(model).__name__} gives other logits row by row than alone (they deviate by {worst:.1e} of their "
            "spread), so the engine would answer wrongly: use lofi generate, or serve it with vLLM"
        )
    return Proved(cache.bytes_per_token, worst)


def _decoded(model: Any, forward: Forward, ids: list[list[int]]) -> list[Tensor]:
    """Logits (5, V) of each row's decoded tokens."""
    try:
        for start in range(0, max(_READ), _CHUNK):
            for row, read in enumerate(_READ):
                if start < read:
                    forward.prefill(row, [ids[row][start : min(start + _CHUNK, read)]], [start], [-1])
        steps = []
        for step in range(_DECODED):
            places = [read + step for read in _READ]
            tokens = [row[place] for row, place in zip(ids, places, strict=True)]
            steps.append(forward.decode(tokens, places, None))
    except LofiError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run with a cache of rows ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}): use lofi generate, or serve it with vLLM"
        ) from error
    return list(torch.stack(steps, 1))


def _deviation(found: Tensor, expected: Tensor) -> float:
    """The largest distance of a token's logits, relative to their spread."""
    found, expected = found.double(), expected.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / spread).max())
