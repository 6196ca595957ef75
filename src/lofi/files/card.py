"""The model card (README.md) of an adapter folder: what it is, and how to load it with lofi and with PEFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lofi.adapters.registry import Adapter

_TEXT = """---
library_name: peft
{base_line}tags:
- lora
- lofi
---

# A LoRA adapter

{summary}

```python
import lofi

model = lofi.load_model("{base}")
lofi.load_adapter(model, "this folder")
```

PEFT loads the same folder: `peft.PeftModel.from_pretrained(model, "this folder")`.
`lofi.json` says which base it belongs to and where it comes from; `lofi verify` replays its golden prompts.
"""


def card_text(adapter: Adapter, base_path: str | None) -> str:
    """README.md of one adapter."""
    return folder_card([(path, part.rank, part.scale) for path, part in adapter.parts.items()], base_path)


def folder_card(parts: Iterable[tuple[str, int | None, float | None]], base_path: str | None, done: str = "") -> str:
    """README.md of an adapter by its parts: (path, rank, multiplier), with `done` a sentence on how it was made.

    A base given by a local path is not written as hub metadata.
    """
    is_hub_id = base_path is not None and base_path.count("/") == 1 and not base_path.startswith((".", "/", "~"))
    return _TEXT.format(
        base_line=f"base_model: {base_path}\n" if is_hub_id else "",
        base=base_path or "the base it was trained on",
        summary=(f"{done}\n\n" if done else "") + _summary(parts),
    )


def _summary(parts: Iterable[tuple[str, int | None, float | None]]) -> str:
    kinds = Counter((path.rsplit(".", 1)[-1], rank, scale) for path, rank, scale in parts)
    rows = ["| modules | count | rank | multiplier |", "|---|---|---|---|"]
    for (leaf, rank, scale), count in sorted(kinds.items(), key=str):
        multiplier = "in full" if scale is None else f"{scale:g}"
        rows.append(f"| {leaf} | {count} | {rank or '-'} | {multiplier} |")
    return "\n".join(rows)
