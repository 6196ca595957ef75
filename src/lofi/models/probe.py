"""Asking a model a question without leaving a trace: a few random tokens, evaluation mode, the random state kept.

Does not know what is asked: `loss.py` and `packing.py` do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module's mode and torch's random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def random_ids(model: nn.Module, *, rows: int, length: int, seed: int) -> Tensor:
    """Token ids that mean nothing special to the model: (rows, length) int64, on the device of its embedding."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_input_embeddings().weight
    config = getattr(model.config, "text_config", None) or model.config
    ids = torch.arange(int(getattr(config, "vocab_size", None) or len(weight)))
    ids = ids[~torch.isin(ids, torch.tensor(sorted(_special(model)), dtype=ids.dtype))]
    picked = torch.randint(len(ids), (rows, length), generator=generator)
    return ids[picked].to(weight.device)


def _special(model: nn.Module) -> set[int]:
    found: set[int] = set()
    for name, value in model.config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")):
            found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return found
