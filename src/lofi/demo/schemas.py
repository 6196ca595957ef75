"""Schemas of the demo and the rows behind them: fixed domains, random ones for training, seeded databases.

Knows what a column holds and how a schema is shown in a prompt; knows no question and no SQL beyond `create table`.
A database is a pure function of (schema, seed), so a data row carries those two and not its tables' contents.
Rejected: storing the rows of every database in the data file (50 times the bytes, and nothing to learn from them).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from zlib import crc32

from .pools import ENDINGS, POOLS, SCHEMA_WORDS, SYLLABLES, TRAIN_DOMAINS, UNSEEN_DOMAINS

ROWS = (24, 40)
VARIANTS = 6


@dataclass(frozen=True)
class Column:
    """One column: `holds` is "id", ">table" (a link), "low-high", a pool's name, or texts joined by "|"."""

    name: str
    holds: str

    @property
    def kind(self) -> str:
        """What the column is for: key, link, number, label (texts that differ in every row) or text (repeated)."""
        if self.holds == "id":
            return "key"
        if self.holds.startswith(">"):
            return "link"
        if "|" in self.holds:
            return "text"
        return "label" if self.holds in POOLS else "number"


@dataclass(frozen=True)
class Table:
    """One table; its first column is always its key, `id`."""

    name: str
    columns: tuple[Column, ...]

    def of_kind(self, *kinds: str) -> list[Column]:
        """The columns whose kind is one of `kinds`, in the order of the table."""
        return [column for column in self.columns if column.kind in kinds]


@dataclass(frozen=True)
class Schema:
    """Two or three tables, linked; every column name but `id` and the links occurs once in the whole schema."""

    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        """The table of that name; KeyError if there is none."""
        return {table.name: table for table in self.tables}[name]

    def text(self) -> str:
        """The schema as prompts show it, `books(id, title, author_id), authors(id, name)`."""
        return ", ".join(f"{t.name}({', '.join(c.name for c in t.columns)})" for t in self.tables)

    def names(self) -> set[str]:
        """Every table and column name except `id`."""
        return {t.name for t in self.tables} | {c.name for t in self.tables for c in t.columns if c.name != "id"}

    def to_dict(self) -> dict[str, dict[str, str]]:
        """{table: {column: what it holds}}, as data files store it; `from_dict` is the inverse."""
        return {t.name: {c.name: c.holds for c in t.columns} for t in self.tables}

    @classmethod
    def from_dict(cls, tables: dict[str, dict[str, str]]) -> Schema:
        """The schema that `to_dict` wrote."""
        return cls(tuple(Table(t, tuple(Column(c, h) for c, h in columns.items())) for t, columns in tables.items()))


def parse_domain(text: str) -> Schema:
    """Read a domain of `pools.py`, every column of it."""
    tables = []
    for line in text.splitlines():
        name, _, columns = line.strip().partition(": ")
        parts = [part.replace(">", "=>").split("=", 1) for part in columns.split(", ")]
        tables.append(Table(name, (Column("id", "id"), *(Column(n, h) for n, h in parts))))
    return Schema(tuple(tables))


def thin(schema: Schema, rng: random.Random) -> Schema:
    """A variant of a domain: two tables with a link between them, or all three, and two or three columns in each."""
    tables = list(schema.tables)
    if len(tables) == 3 and rng.random() < 0.5:
        child = rng.choice([t for t in tables if t.of_kind("link")])
        parents = {c.holds[1:] for c in child.of_kind("link")}
        tables = [child, schema.table(rng.choice(sorted(parents)))]
    kept = {t.name for t in tables}
    return Schema(tuple(_thin_table(t, kept, rng) for t in tables))


def _thin_table(table: Table, kept: set[str], rng: random.Random) -> Table:
    plain = table.of_kind("number", "text", "label")
    wanted = rng.sample(plain, min(len(plain), rng.choice((2, 3))))
    links = [c for c in table.of_kind("link") if c.holds[1:] in kept]
    return Table(table.name, (table.columns[0], *wanted, *links))


@cache
def fixed_schemas(split: str) -> tuple[Schema, ...]:
    """The schemas of the hand-written domains, VARIANTS of each: `train` (also asked about in the test) or `unseen`."""
    domains = {"train": TRAIN_DOMAINS, "unseen": UNSEEN_DOMAINS}[split]
    rng = random.Random(f"schemas {split}")
    return tuple(thin(parse_domain(domain), rng) for domain in domains for _ in range(VARIANTS))


@cache
def schema_words() -> tuple[str, ...]:
    """The nouns of random schemas, without the held-out ones."""
    return tuple(word for word in SCHEMA_WORDS.split() if word not in held_out_words())


@cache
def _syllables() -> tuple[str, ...]:
    return tuple(SYLLABLES.split())


@cache
def held_out_words() -> frozenset[str]:
    """Every word of the unseen domains' names, and their singulars: none may occur in a training schema."""
    names = {name for domain in UNSEEN_DOMAINS for name in parse_domain(domain).names()}
    words = {word for name in names for word in (name, *name.split("_"))} - {"id"}
    return frozenset(words | {word.removesuffix("s") for word in words})


def made_up_word(rng: random.Random, syllables: tuple[int, ...] = (2, 2, 3)) -> str:
    """A word that no language has, so that only copying can get it right."""
    return "".join(rng.choice(_syllables()) for _ in range(rng.choice(syllables))) + rng.choice(ENDINGS)


def random_schema(rng: random.Random) -> Schema:
    """A schema of random nouns and made-up words: two tables, or three of which one or two link to another."""
    names = _random_names(rng)
    shape = rng.choice(("pair", "pair", "pair", "pair", "chain", "star"))
    links = {"pair": ((1,), ()), "chain": ((1,), (2,), ()), "star": ((1, 2), (), ())}[shape]
    stems = [next(names) for _ in links]
    tables = []
    for stem, parents in zip(stems, links, strict=True):
        columns = [Column(next(names), _random_holds(rng, i)) for i in range(rng.choice((2, 2, 3)))]
        rng.shuffle(columns)
        joined = [Column(f"{stems[p]}_id", f">{stems[p]}s") for p in parents]
        tables.append(Table(f"{stem}s", (Column("id", "id"), *columns, *joined)))
    rng.shuffle(tables)
    return Schema(tuple(tables))


def _random_names(rng: random.Random) -> Iterator[str]:
    """Names that differ from each other and from every held-out word, without end."""
    used = set(held_out_words())
    while True:
        word = rng.choice(schema_words()) if rng.random() < 0.65 else made_up_word(rng)
        if rng.random() < 0.1:
            word = f"{word}_{rng.choice(schema_words())}"
        parts = {word, *word.split("_"), word.removesuffix("s")}
        if parts & used or word == "id":
            continue
        used.add(word)
        yield word


def _random_holds(rng: random.Random, place: int) -> str:
    """Number, then label or text, then anything: so that each kind of question can be asked of each table."""
    kind = ("number", rng.choice(("label", "text")), rng.choice(("number", "text")))[place]
    if kind == "number":
        low = rng.choice((1, 5, 10, 100, 1900))
        return f"{low}-{low * rng.choice((9, 40, 90)) if low < 1900 else 2024}"
    if kind == "label":
        return rng.choice(sorted(POOLS))
    return "|".join(sorted({_made_up_value(rng) for _ in range(6)}))


def _made_up_value(rng: random.Random) -> str:
    word = made_up_word(rng) if rng.random() < 0.6 else rng.choice(schema_words())
    word = f"{word} {made_up_word(rng)}" if rng.random() < 0.15 else word
    return word.title() if rng.random() < 0.5 else word


def database(schema: Schema, seed: int) -> dict[str, list[tuple]]:
    """Fill every table: {table: rows}, a pure function of (schema, seed); labels and most numbers do not repeat."""
    rng = random.Random(f"rows {seed}")
    sizes = {table.name: rng.randint(*ROWS) for table in schema.tables}
    return {table.name: _fill(table, sizes, rng) for table in schema.tables}


def _fill(table: Table, sizes: dict[str, int], rng: random.Random) -> list[tuple]:
    n = sizes[table.name]
    return list(zip(*(_column_values(column, n, sizes, rng) for column in table.columns), strict=True))


def _column_values(column: Column, n: int, sizes: dict[str, int], rng: random.Random) -> list:
    if column.kind == "key":
        return list(range(1, n + 1))
    if column.kind == "link":
        return [rng.randint(1, sizes[column.holds[1:]]) for _ in range(n)]
    if column.kind == "text":
        return [rng.choice(column.holds.split("|")) for _ in range(n)]
    if column.kind == "label":
        first, second = (words.split() for words in POOLS[column.holds])
        pairs = rng.sample(range(len(first) * len(second)), n)
        return [f"{first[p % len(first)]} {second[p // len(first)]}" for p in pairs]
    low, high = (int(bound) for bound in column.holds.split("-"))
    span = range(low, high + 1)
    return rng.sample(span, n) if len(span) >= n else [rng.choice(span) for _ in range(n)]


def for_test(value: int | str) -> bool:
    """True for the third of all literals that only the tests may use: training never names them."""
    return value % 3 == 2 if isinstance(value, int) else crc32(value.encode()) % 3 == 2
