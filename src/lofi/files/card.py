"""The model card (README.md) of an adapter folder: what it is, and how to load it with lofi and with PEFT."""

from __future__ import annotations

from collections import Counter

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
    """README.md of one adapter; a base given by a local path is not written as hub metadata."""
    is_hub_id = base_path is not None and base_path.count("/") == 1 and not base_path.startswith((".", "/", "~"))
    return _TEXT.format(
        base_line=f"base_model: {base_path}\n" if is_hub_id else "",
        base=base_path or "the base it was trained on",
        summary=_summary(adapter),
    )


def _summary(adapter: Adapter) -> str:
    kinds = Counter((p.rsplit(".", 1)[-1], part.rank, part.scale) for p, part in adapter.parts.items())
    rows = ["| modules | count | rank | multiplier |", "|---|---|---|---|"]
    for (leaf, rank, scale), count in sorted(kinds.items(), key=str):
        multiplier = "in full" if scale is None else f"{scale:g}"
        rows.append(f"| {leaf} | {count} | {rank or '-'} | {multiplier} |")
    return "\n".join(rows)
