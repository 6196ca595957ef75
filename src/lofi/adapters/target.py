"""From patterns to modules: which names of a config mean which modules of this model.

PEFT's rules, because files carry its patterns: a list matches a module whose path equals an entry or ends in
".entry"; a string is a regex that must match the whole path; "all-linear" is every linear but the output head.
Unlike PEFT, every pattern must match: one that matches nothing is an error that names the nearest modules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import nn

from lofi.adapters.config import ALL_LINEAR, LoraConfig, Names
from lofi.adapters.experts import is_experts
from lofi.adapters.linear import product_of
from lofi.adapters.surgery import named_base_modules
from lofi.errors import TargetError

T = TypeVar("T")


def matches(path: str, pattern: Names) -> bool:
    """Whether a module path is meant by a list of suffixes or by a regex."""
    if pattern is None:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(_is_suffix(path, name) for name in pattern)


def _is_suffix(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def by_pattern(path: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first key that equals the path, ends it, or matches it as a regex after any prefix (PEFT)."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def target_modules(model: nn.Module, config: LoraConfig, saved: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The linears and embeddings that `config` adapts, by path; `saved` paths train whole and are left out.

    Raises TargetError naming every pattern that matched nothing, with the nearest names and their counts, and every
    match that is neither a linear nor an embedding.
    """
    _known_patterns(model, config)
    saved = set(saved)
    if not config.target_modules:
        return {}
    chosen = {}
    for path, module in named_base_modules(model):
        if not path or path in saved or any(path.startswith(f"{name}.") for name in saved):
            continue
        if matches(path, config.exclude_modules) or not _in_layers(path, config):
            continue
        if _meant(path, module, model, config):
            chosen[path] = module
    if not chosen:
        raise TargetError(f"{_describe(config)} leaves no module to adapt; {_offer(model, str(config.target_modules))}")
    unfit = [f"{path} ({type(m).__name__})" for path, m in chosen.items() if not adaptable(m)]
    if unfit:
        raise TargetError(
            f"target_modules matches what LoRA cannot adapt: {', '.join(unfit[:5])}; "
            "it adapts linears, Conv1D and embeddings: name those, or train the module whole with modules_to_save"
        )
    return chosen


def adaptable(module: nn.Module) -> bool:
    """Whether LoRA has a part for this module: a linear of known storage, or an embedding."""
    return product_of(module) is not None or isinstance(module, nn.Embedding)


def target_parameters(model: nn.Module, suffixes: Sequence[str] | None) -> dict[str, list[str]]:
    """Experts modules by path, with the names of their 3-D parameters that the suffixes mean."""
    chosen: dict[str, list[str]] = {}
    matched: set[str] = set()
    for path, module in named_base_modules(model):
        for name, parameter in module._parameters.items():
            hits = [s for s in suffixes or () if parameter is not None and _is_suffix(f"{path}.{name}", s)]
            if hits:
                chosen.setdefault(path, []).append(name)
                matched.update(hits)
    missing = [suffix for suffix in suffixes or () if suffix not in matched]
    if missing:
        offers = sorted({f"{p.rsplit('.', 2)[-1]}.{n}" for p, n, _ in expert_parameters(model)})
        raise TargetError(
            f"target_parameters {missing} match no parameter; "
            f"fused expert parameters here: {', '.join(offers) or 'none: this model is not a mixture of experts'}"
        )
    return chosen


def expert_parameters(model: nn.Module) -> list[tuple[str, str, tuple[int, ...]]]:
    """(module path, parameter name, shape) of every fused expert parameter, adapted or not."""
    return [
        (path, name, tuple(parameter.shape))
        for path, module in named_base_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and is_experts(module)
    ]


def named_modules_for(model: nn.Module, names: Iterable[str], key: str) -> dict[str, nn.Module]:
    """Modules by suffix; TargetError names each suffix without a match. `key` is what the user called the list."""
    chosen: dict[str, nn.Module] = {}
    missing = []
    for name in names:
        found = {path: module for path, module in named_base_modules(model) if path and _is_suffix(path, name)}
        chosen |= found
        if not found:
            missing.append(f"{key} {name!r} matches no module; {_offer(model, name, linear_only=False)}")
    if missing:
        raise TargetError("; ".join(missing))
    return chosen


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, where the model says which."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None


def reading_embeddings(model: Any) -> dict[str, nn.Module]:
    """Where an encoder-decoder reads its tokens, if not through the embedding that it names: {path: the one it names}.

    T5's and BART's `shared` only owns the weight; encoder and decoder have an embedding each that shares it.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    owner = model.get_input_embeddings()
    return {
        path: owner
        for path, module in named_base_modules(model)
        if isinstance(module, nn.Embedding) and module is not owner and module.weight is owner.weight
    }


def refuse_unread(model: Any, chosen: Mapping[str, nn.Module]) -> None:
    """Raise TargetError if the embedding that an encoder-decoder never calls is to be adapted."""
    readers = reading_embeddings(model)
    unread = [path for path, module in chosen.items() if any(module is owner for owner in readers.values())]
    if unread:
        raise TargetError(
            f"{unread[0]} only holds the weight that {' and '.join(readers)} read, so an adapter on it is never "
            "called; name those in target_modules"
        )


def _meant(path: str, module: nn.Module, model: nn.Module, config: LoraConfig) -> bool:
    if config.target_modules != ALL_LINEAR:
        return matches(path, config.target_modules)
    return product_of(module) is not None and module is not output_head(model)


def _in_layers(path: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    pattern = config.layers_pattern
    lists = [pattern] if isinstance(pattern, str) else list(pattern or ())
    before = rf"(?:{'|'.join(lists)})" if lists else r"[^.]+"
    index = re.search(rf"(?:^|\.){before}\.(\d+)\.", path)
    return index is not None and int(index.group(1)) in wanted


def _known_patterns(model: nn.Module, config: LoraConfig) -> None:
    """Every pattern of the config must mean something in this model, also ranks, alphas and exclusions."""
    paths = [path for path, _ in named_base_modules(model) if path]
    faults = []
    for key in ("target_modules", "exclude_modules"):
        value: Any = getattr(config, key)
        if value is None or value == ALL_LINEAR:
            continue
        for pattern in [value] if isinstance(value, str) else value:
            wanted = pattern if isinstance(value, str) else [pattern]
            if not any(matches(path, wanted) for path in paths):
                faults.append(f"{key} {pattern!r} matches no module; {_offer(model, pattern, linear_only=True)}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(by_pattern(path, {pattern: True}, False) for path in paths):
                faults.append(f"{key} {pattern!r} matches no module; {_offer(model, pattern, linear_only=True)}")
    if faults:
        raise TargetError("; ".join(faults))


def _offer(model: nn.Module, wanted: str, *, linear_only: bool = True) -> str:
    """The nearest names with their counts, else all there are."""
    counts = Counter(
        path.rsplit(".", 1)[-1]
        for path, module in named_base_modules(model)
        if path and not path.rsplit(".", 1)[-1].isdigit() and (adaptable(module) or not linear_only)
    )
    near = get_close_matches(wanted.rsplit(".", 1)[-1], counts, n=3, cutoff=0.5)
    named = ", ".join(f"{name!r} ({counts[name]})" for name in near or sorted(counts)[:12])
    total = sum(counts.values())
    return f"{'nearest' if near else 'there are'}: {named or 'none'} ({total} modules seen)"


def _describe(config: LoraConfig) -> str:
    parts = [f"target_modules {config.target_modules!r}"]
    if config.exclude_modules is not None:
        parts.append(f"without {config.exclude_modules!r}")
    if config.layers_to_transform is not None:
        parts.append(f"in layers {config.layers_to_transform!r}")
    return " ".join(parts)
