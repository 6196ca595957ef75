"""The view: rows of a data set with each token's fate in colour, for the terminal (rich) and for pages (HTML).

Runs of tokens with one fate are decoded together, because one token is often part of a character. Marks say the same
as the colours, so a log without colour reads as well. Not known here: how fates were decided. Rejected: a token a cell
(ten screens for one row, and Vietnamese in halves).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from lofi.data.examples import Example
from lofi.data.labels import IGNORED
from lofi.data.prepare import Prepared

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_LOOK = {  # fate: (mark before, mark after, rich style, css)
    "trained": ("⟦", "⟧", "bold green", "background:#c8f0cf;color:#0b3d17"),
    "context": ("", "", "default", "color:#333"),
    "cut": ("✂⟨", "⟩✂", "red strike", "color:#a11;text-decoration:line-through"),
    "pad": ("⟨", "⟩", "dim", "color:#999"),
}
_MOST = 1200  # characters of one run that are shown; the middle of a longer one is counted instead


class Run(NamedTuple):
    """Consecutive tokens with one fate."""

    fate: str
    text: str
    tokens: int


def runs(example: Example, tokenizer: Any, *, padded_to: int = 0) -> list[Run]:
    """One example as runs: trained, context and cut tokens in order, then the padding up to `padded_to` tokens."""
    result = []
    for fate, part in groupby(_fates(example), key=lambda pair: pair[0]):
        ids = [token_id for _, token_id in part]
        result.append(Run(fate, tokenizer.decode(ids, skip_special_tokens=False), len(ids)))
    if example.task == "SEQ_2_SEQ_LM":
        labels = example.labels_buffer.tolist()
        result.append(Run("trained", tokenizer.decode(labels, skip_special_tokens=False), len(labels)))
    missing = padded_to - example.size
    return result + ([Run("pad", f"pad × {missing}", missing)] if missing > 0 else [])


def _fates(example: Example) -> Iterator[tuple[str, int]]:
    ids = example.input_ids
    trained = [False] * len(ids)
    if example.task in ("CAUSAL_LM", "TOKEN_CLS"):
        trained = [label != IGNORED for label in example.labels_buffer]
    for place, token_id in enumerate(ids):
        if place == example.cut_at:
            yield from (("cut", removed) for removed in example.cut)
        yield ("trained" if trained[place] else "context"), token_id
    if example.cut_at >= len(ids):
        yield from (("cut", removed) for removed in example.cut)


def chosen(examples: Sequence[Example], rows: int) -> list[int]:
    """Which examples to show: the first, the most cut (or else the longest), then evenly spread ones."""
    striking = max(range(len(examples)), key=lambda place: (len(examples[place].cut), examples[place].size))
    spread = [len(examples) * step // (rows + 1) for step in range(1, rows + 1)]
    return sorted(list(dict.fromkeys([0, striking, *spread, *range(len(examples))]))[:rows])


def show(prepared: Prepared, tokenizer: Any, rows: int = 3) -> Group:
    """The report, a legend, and `rows` examples as they would stand padded together, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    places = chosen(prepared.examples, rows)
    width = max(prepared.examples[place].size for place in places)
    lines: list[Text] = [Text(line) for line in prepared.report.lines()]
    lines += [Text(), _legend()]
    for place in places:
        lines += [Text(), Text(_title(prepared, place), style="bold cyan")]
        lines.append(_coloured(runs(prepared.examples[place], tokenizer, padded_to=width)))
    return Group(*lines)


def _title(prepared: Prepared, place: int) -> str:
    example = prepared.examples[place]
    label = f", label {_label(prepared, example)}" if example.task == "SEQ_CLS" else ""
    cut = f", {len(example.cut)} cut" if example.cut else ""
    trained = "" if label else f", {example.n_trained} trained"
    return f"{prepared.where(place)} · {example.size} tokens{trained}{cut}{label}"


def _label(prepared: Prepared, example: Example) -> str:
    names, label = prepared.labels or [], example.labels
    if isinstance(label, int):
        return str(names[label])
    return ", ".join(str(name) for name, value in zip(names, label, strict=True) if value) or "none"


def _legend() -> Text:
    from rich.text import Text

    result = Text()
    for fate, (before, after, style, _) in _LOOK.items():
        result.append(f"{before}{fate}{after}", style=style)
        result.append("  ")
    return result


def _coloured(parts: Sequence[Run]) -> Text:
    from rich.text import Text

    result = Text()
    for part in parts:
        before, after, style, _ = _LOOK[part.fate]
        result.append(f"{before}{_shortened(part.text)}{after}", style=style)
    return result


def _shortened(text: str) -> str:
    if len(text) <= _MOST:
        return text
    half = _MOST // 2
    return f"{text[:half]} …({len(text) - 2 * half} characters)… {text[-half:]}"


def html_fragment(prepared: Prepared, tokenizer: Any, rows: int = 3) -> str:
    """The same view as an HTML fragment with inline styles, everything escaped; for report pages."""
    places = chosen(prepared.examples, rows)
    width = max(prepared.examples[place].size for place in places)
    facts = "".join(f"<li>{html.escape(line)}</li>" for line in prepared.report.lines())
    legend = " ".join(_span(Run(fate, fate, 1)) for fate in _LOOK)
    shown = "".join(
        f"<p><b>{html.escape(_title(prepared, place))}</b></p><pre style='white-space:pre-wrap'>"
        + "".join(_span(part) for part in runs(prepared.examples[place], tokenizer, padded_to=width))
        + "</pre>"
        for place in places
    )
    return f"<section class='lofi-data'><ul>{facts}</ul><p>{legend}</p>{shown}</section>"


def _span(part: Run) -> str:
    before, after, _, css = _LOOK[part.fate]
    return f"<span style='{css}'>{html.escape(before + _shortened(part.text) + after)}</span>"
