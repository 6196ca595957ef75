"""DataReport: what became of a data set, in figures and in lines to print.

Counts only; this file does not know tokenizers. A figure that does not apply to the kind of data is not in the lines.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class DataReport:
    """Filled by `prepare`; `padding` and `packed` by the caller once the batches are grouped (`note_batches`)."""

    source: str
    kind: str
    rule: str
    """How text becomes ids, in words."""
    rows: int = 0
    examples: int = 0
    trained_tokens: int = 0
    context_tokens: int = 0
    completions: int = 0
    eos_trained: int = 0
    """Completions (or texts) whose last trained token is a stop token; equals `completions`, or prepare raises."""
    truncated_rows: int = 0
    tokens_cut: int = 0
    trained_tokens_cut: int = 0
    """Cut tokens that would have been trained: only tags beyond max_length; completions are never cut."""
    split_rows: int = 0
    """Texts in windows, or conversations in an example a turn."""
    split_examples: int = 0
    lost_words: int = 0
    """Tagged words for which the tokenizer has no token."""
    stop_in_text: int = 0
    """Completions that contain the stop token in their own words."""
    longest: int = 0
    percentiles: dict[str, int] = field(default_factory=dict)
    label_counts: dict[str, int] = field(default_factory=dict)
    packed: bool | None = None
    padding: float | None = None
    """Share of the batches' tokens that are padding."""

    def note_lengths(self, lengths: list[int]) -> None:
        """Keep the longest and the 50th, 90th and 99th percentile (nearest rank) of the examples' lengths."""
        ordered = sorted(lengths)
        self.longest = ordered[-1]
        rank = {name: -(-len(ordered) * share // 100) - 1 for name, share in (("p50", 50), ("p90", 90), ("p99", 99))}
        self.percentiles = {name: ordered[place] for name, place in rank.items()}

    def note_batches(self, *, packed: bool, padding: float) -> None:
        """Add how the examples were grouped and what share of the tokens is padding."""
        self.packed, self.padding = packed, padding

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The figures in words, a fact a line."""
        facts = [
            self._head(),
            self.rule,
            self._tokens(),
            self._endings(),
            self._lengths(),
            self._cuts(),
            self._splits(),
        ]
        facts += [self._oddities(), self._labels(), self._batches()]
        return [fact for fact in facts if fact]

    def _head(self) -> str:
        more = f" as {self.examples:,} examples" if self.examples != self.rows else ""
        return f"{self.source}: {self.rows:,} rows ({self.kind}){more}"

    def _tokens(self) -> str:
        if self.kind == "classification":
            return f"{self.context_tokens:,} tokens read, {self.examples:,} labels trained"
        if self.kind == "token_classification":
            return f"{self.context_tokens + self.trained_tokens:,} tokens read, {self.trained_tokens:,} tags trained"
        return f"{self.trained_tokens:,} trained tokens, {self.context_tokens:,} context tokens"

    def _endings(self) -> str:
        return f"EOS trained in {self.eos_trained:,}/{self.completions:,}" if self.completions else ""

    def _lengths(self) -> str:
        figures = ", ".join(f"{name} {value:,}" for name, value in self.percentiles.items())
        return f"length in tokens: {figures}, longest {self.longest:,}"

    def _cuts(self) -> str:
        if not self.truncated_rows:
            return "no row truncated"
        trained = (
            f", {self.trained_tokens_cut:,} tags among them" if self.trained_tokens_cut else ", none of them trained"
        )
        return f"{self.truncated_rows:,} rows truncated, {self.tokens_cut:,} tokens cut{trained}"

    def _splits(self) -> str:
        what = "windows" if self.kind == "text" else "examples, one for each answer"
        return f"{self.split_rows:,} rows split into {self.split_examples:,} {what}" if self.split_rows else ""

    def _oddities(self) -> str:
        lost = f"{self.lost_words:,} tagged words have no token in this tokenizer" if self.lost_words else ""
        stop = (
            f"{self.stop_in_text:,} completions contain the stop token in their own words" if self.stop_in_text else ""
        )
        return "; ".join(fact for fact in (lost, stop) if fact)

    def _labels(self) -> str:
        shown = ", ".join(f"{name} {count:,}" for name, count in list(self.label_counts.items())[:20])
        return f"labels: {shown}" if shown else ""

    def _batches(self) -> str:
        if self.padding is None:
            return ""
        how = "packed without crossing between examples" if self.packed else "grouped by length"
        return f"{how}, {self.padding:.1%} padding"
