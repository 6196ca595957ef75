"""The model card (README.md) of an adapter folder: what it is, how to load it, and what cannot be done with it."""

from __future__ import annotations

from collections import Counter

from lofi.adapters.config import AdapterConfig
from lofi.adapters.methods import MixedConfig
from lofi.adapters.registry import Adapter

_TEXT = """---
{about}
---

# {title}

{summary}

```python
import lofi

model = lofi.load_model("{base}")
lofi.load_adapter(model, "this folder")
```

{others}
`lofi.json` says which base it belongs to and where it comes from; `lofi verify` replays its golden prompts.
"""

_TITLES = {
    "lora": "A LoRA adapter",
    "houlsby": "Adapter layers after attention and MLP (Houlsby et al.)",
    "adapter-lin": "Adapter layers after each block (Lin et al.)",
    "prefix": "A prefix (prefix tuning)",
    "prompt": "A soft prompt (prompt tuning)",
    "bitfit": "Trained biases (BitFit)",
    "last-layers": "The last blocks, trained in full",
}


def card_text(adapter: Adapter, base_path: str | None) -> str:
    """README.md of one adapter; a base given by a local path is not written as hub metadata."""
    config = adapter.config
    is_hub_id = base_path is not None and base_path.count("/") == 1 and not base_path.startswith((".", "/", "~"))
    about = [f"library_name: {'peft' if _in_peft(config) else 'lofi'}"]
    about += [f"base_model: {base_path}"] if is_hub_id else []
    return _TEXT.format(
        about="\n".join([*about, "tags:", *(f"- {one.method}" for one in _methods(config)), "- lofi"]),
        title=" with ".join(_TITLES[one.method] for one in _methods(config)),
        base=base_path or "the base it was trained on",
        summary=_summary(adapter),
        others=_others(config),
    )


def _methods(config: AdapterConfig) -> list[AdapterConfig]:
    return list(config.configs) if isinstance(config, MixedConfig) else [config]


def _in_peft(config: AdapterConfig) -> bool:
    return not config.peft_type.startswith("LOFI_")


def _others(config: AdapterConfig) -> str:
    """What else loads the folder, and whether it merges."""
    lines = ['PEFT loads the same folder: `peft.PeftModel.from_pretrained(model, "this folder")`.']
    if not _in_peft(config):
        lines = [f"PEFT does not have this method (`{config.peft_type}`), so only lofi loads the folder."]
    reason = config.why_unmergeable()
    return "\n".join([*lines, *([f"It is served beside its base and not merged into it: {reason}."] if reason else [])])


def _summary(adapter: Adapter) -> str:
    """A table of the adapted modules, with rank and multiplier where they have one."""
    kinds = Counter((_leaf(path), part.kind, part.rank, part.scale) for path, part in adapter.parts.items())
    sizes: Counter[tuple[str, str, int | None, float | None]] = Counter()
    for path, part in adapter.parts.items():
        sizes[_leaf(path), part.kind, part.rank, part.scale] += sum(p.numel() for p in part.parameters())
    rows = ["| modules | count | what trains | rank | multiplier | parameters |", "|---|---|---|---|---|---|"]
    for key, count in sorted(kinds.items(), key=str):
        leaf, kind, rank, scale = key
        multiplier = "-" if scale is None else f"{scale:g}"
        rows.append(f"| {leaf} | {count} | {kind} | {rank or '-'} | {multiplier} | {sizes[key]:,} |")
    return "\n".join([*rows, *(f"\nNote: {note}." for note in adapter.report.notes)])


def _leaf(path: str) -> str:
    """The last word of a path; a block, whose last word is a number, goes by the name of its list."""
    *before, last = path.split(".")
    return f"{before[-1]}.*" if last.isdigit() and before else last
