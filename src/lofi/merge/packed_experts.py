"""Experts of a merged model, packed: every expert's W0 + s B A is formed in float32 and rounded to nearest.

Compensated rounding needs the inputs of each expert, of which most calibration rows reach only a few; the experts are
therefore rounded alone, which the report says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lofi.adapters.merge import dense_tensor
from lofi.adapters.registry import adapter_of, registry_of
from lofi.adapters.surgery import Adapted, detach_part
from lofi.merge.shards import Change
from lofi.quant.experts import FrozenExperts, freeze_experts


def pack_experts(model: Any, name: str, twin: Any, wanted: Mapping[str, Change], config: Any) -> int:
    """Merge and pack the experts that `twin`, an empty model packed by `config`, packs; how many modules changed."""
    found = {path: m for path, m in twin.named_modules() if isinstance(m, FrozenExperts)}
    done = 0
    for path, frozen in found.items():
        module = model.get_submodule(path)
        same = isinstance(module, FrozenExperts) and module.quant_type == config.kind
        if not (same and not any(f"{path}.{key}" in wanted for key in frozen.packed_shapes)):
            _pack(model, name, path, wanted, config)
            done += 1
    return done


@torch.no_grad()
def _pack(model: Any, name: str, path: str, wanted: Mapping[str, Change], config: Any) -> None:
    module = model.get_submodule(path)
    dtype = module.dense_dtype if isinstance(module, FrozenExperts) else next(module.parameters()).dtype
    names = [key for key, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
    changed = {key: wanted[f"{path}.{key}"] for key in names if f"{path}.{key}" in wanted}
    if isinstance(module, Adapted):
        detach_part(module, name)
        adapter_of(model, name).parts.pop(path, None)
    if isinstance(module, FrozenExperts):
        model.set_submodule(path, module.to_dense())
        module = model.get_submodule(path)
    dense = {key: dense_tensor(module, key).detach() for key in names}
    freeze_experts(module, names, config, device=dense[names[0]].device)
    for key, held in dense.items():
        weight = held.float()
        module.quantize_(key, changed[key].part.merged(key, weight) if key in changed else weight)
        registry_of(model).required_grad.pop(f"{path}.{key}", None)  # codes cannot be thawed
    module.dense_dtype = dtype
