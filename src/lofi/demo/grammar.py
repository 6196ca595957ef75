"""From a schema and a random generator to one question with its SQL, in English or Vietnamese.

Knows which questions a schema allows and how their SQL is written; the sentences are in `sentences.py`. Every name in
the SQL stands in the prompt and after a space there too (`avg( price )`), so that it is copied token for token: that is
what carries over to schemas never seen. Literals come from the question's own database, so answers are seldom empty.
Rejected: qualifying every column (`books.price`), which re-tokenizes each name; columns are unique in a schema instead.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .schemas import Column, Schema, Table, database, for_test
from .sentences import AGGREGATES, AND, COMPARISONS, DIRECTIONS, EXTREMES, SENTENCES, TEXT_EQUALS

KINDS = tuple(SENTENCES["en"])
HARD = ("top", "order", "join_select", "join_count", "join_aggregate", "join_group")
LANGUAGES = tuple(SENTENCES)


@dataclass(frozen=True)
class Question:
    """One question about `schema` and the SQL that answers it; `database(schema, seed)` holds the rows."""

    text: str
    sql: str
    kind: str
    language: str
    schema: Schema
    seed: int


class _Unfit(Exception):
    """This schema and database do not allow the kind of question that was drawn; another one is drawn."""


class _Asker:
    """Draws the parts of one question: each method returns words for the sentence and the SQL that says the same."""

    def __init__(self, schema: Schema, seed: int, language: str, rng: random.Random, testing: bool):
        self.schema, self.language, self.rng, self.testing = schema, language, rng, testing
        self.rows = database(schema, seed)

    def pick(self, options: list | tuple):
        if not options:
            raise _Unfit
        return self.rng.choice(options)

    def values(self, table: Table, column: Column) -> list:
        place = table.columns.index(column)
        return [row[place] for row in self.rows[table.name] if for_test(row[place]) == self.testing]

    def selected(self, table: Table, without: Column | None = None) -> tuple[str, str]:
        columns = [c for c in table.of_kind("label", "text", "number") if c != without]
        count = 2 if len(columns) > 1 and self.rng.random() < 0.25 else 1
        names = [c.name for c in self.rng.sample(columns, count)] if columns else [self.pick([])]
        return AND[self.language].join(names), ", ".join(names)

    def condition(self, table: Table, without: Column | None = None) -> tuple[Column, str, str]:
        column = self.pick([c for c in table.of_kind("label", "text", "number") if c != without])
        values = sorted(self.values(table, column))
        if column.kind == "number":
            sign = self.rng.choice("><><=")
            value = self.pick(values[len(values) // 5 : -(len(values) // 5) or None])
            words = self.pick(COMPARISONS[self.language][sign]).format(c=column.name, v=value)
            return column, words, f"{column.name} {sign} {value}"
        value = self.pick(values)
        words = self.pick(TEXT_EQUALS[self.language]).format(c=column.name, v=value)
        return column, words, f"{column.name} = '{value}'"

    def aggregate(self, table: Table, without: Column | None = None) -> tuple[str, str]:
        column = self.pick([c for c in table.of_kind("number") if c != without])
        function = self.pick(("avg", "max", "min", "sum"))
        words = self.pick(AGGREGATES[self.language][function]).format(c=column.name)
        return words, f"{function}( {column.name} )"

    def sorting(self, table: Table, words: dict) -> tuple[Column, str, str]:
        column = self.pick(table.of_kind("number"))
        way = self.pick(("asc", "desc"))
        said = self.pick(words[self.language][way]).format(c=column.name)
        return column, said, f" order by {column.name} {way}"

    def joined(self) -> tuple[Table, Table, str]:
        """A table with a link, the table it points to, and the SQL from `from` on."""
        child, link = self.pick([(t, c) for t in self.schema.tables for c in t.of_kind("link")])
        parent = self.schema.table(link.holds[1:])
        return child, parent, f"from {child.name} join {parent.name} on {link.name} = {parent.name}.id"

    def say(self, kind: str, **words: object) -> str:
        return self.pick(SENTENCES[self.language][kind]).format(**words)


def _select(ask: _Asker, kind: str) -> tuple[str, str]:
    table = ask.pick(ask.schema.tables)
    column, w, where = ask.condition(table)
    c, columns = ask.selected(table, without=column)
    return ask.say(kind, c=c, t=table.name, w=w), f"select {columns} from {table.name} where {where}"


def _count(ask: _Asker, kind: str) -> tuple[str, str]:
    table = ask.pick(ask.schema.tables)
    _, w, where = ask.condition(table)
    return ask.say(kind, t=table.name, w=w), f"select count(*) from {table.name} where {where}"


def _aggregate(ask: _Asker, kind: str) -> tuple[str, str]:
    table = ask.pick(ask.schema.tables)
    a, value = ask.aggregate(table)
    return ask.say(kind, a=a, t=table.name), f"select {value} from {table.name}"


def _aggregate_where(ask: _Asker, kind: str) -> tuple[str, str]:
    table = ask.pick(ask.schema.tables)
    column, w, where = ask.condition(table)
    a, value = ask.aggregate(table, without=column)
    return ask.say(kind, a=a, t=table.name, w=w), f"select {value} from {table.name} where {where}"


def _top(ask: _Asker, kind: str) -> tuple[str, str]:
    table, n = ask.pick(ask.schema.tables), ask.rng.randint(2, 5)
    column, k, order = ask.sorting(table, EXTREMES)
    c, columns = ask.selected(table, without=column)
    return ask.say(kind, c=c, n=n, t=table.name, k=k), f"select {columns} from {table.name}{order} limit {n}"


def _order(ask: _Asker, kind: str) -> tuple[str, str]:
    table = ask.pick(ask.schema.tables)
    column, k, order = ask.sorting(table, DIRECTIONS)
    c, columns = ask.selected(table, without=column)
    return ask.say(kind, c=c, t=table.name, k=k), f"select {columns} from {table.name}{order}"


def _group(ask: _Asker, kind: str) -> tuple[str, str]:
    table = ask.pick([t for t in ask.schema.tables if t.of_kind("text")])
    g = ask.pick(table.of_kind("text")).name
    return ask.say(kind, g=g, t=table.name), f"select {g}, count(*) from {table.name} group by {g}"


def _group_aggregate(ask: _Asker, kind: str) -> tuple[str, str]:
    table = ask.pick([t for t in ask.schema.tables if t.of_kind("text")])
    g = ask.pick(table.of_kind("text")).name
    a, value = ask.aggregate(table)
    return ask.say(kind, a=a, g=g, t=table.name), f"select {g}, {value} from {table.name} group by {g}"


def _join_select(ask: _Asker, kind: str) -> tuple[str, str]:
    first, second, source = ask.joined()
    c, columns = ask.selected(first)
    _, w, where = ask.condition(second)
    return ask.say(kind, c=c, t=first.name, u=second.name, w=w), f"select {columns} {source} where {where}"


def _join_count(ask: _Asker, kind: str) -> tuple[str, str]:
    first, second, source = ask.joined()
    _, w, where = ask.condition(second)
    return ask.say(kind, t=first.name, u=second.name, w=w), f"select count(*) {source} where {where}"


def _join_aggregate(ask: _Asker, kind: str) -> tuple[str, str]:
    first, second, source = ask.joined()
    a, value = ask.aggregate(first)
    _, w, where = ask.condition(second)
    return ask.say(kind, a=a, t=first.name, u=second.name, w=w), f"select {value} {source} where {where}"


def _join_group(ask: _Asker, kind: str) -> tuple[str, str]:
    first, second, source = ask.joined()
    g = ask.pick(second.of_kind("text")).name
    return ask.say(kind, g=g, t=first.name, u=second.name), f"select {g}, count(*) {source} group by {g}"


_MAKERS = {
    "select": _select,
    "count": _count,
    "aggregate": _aggregate,
    "aggregate_where": _aggregate_where,
    "top": _top,
    "order": _order,
    "group": _group,
    "group_aggregate": _group_aggregate,
    "join_select": _join_select,
    "join_count": _join_count,
    "join_aggregate": _join_aggregate,
    "join_group": _join_group,
}


def make_question(schema: Schema, rng: random.Random, *, testing: bool) -> Question:
    """Draw one question about the schema: kind, language, names, literals and the seed of its database.

    `testing` chooses between the literals kept for tests and all the others, so no tested number or text was trained.
    Tests draw every kind alike; training asks the HARD ones twice as often.
    """
    kinds = KINDS if testing else KINDS + HARD
    while True:
        kind, language, seed = rng.choice(kinds), rng.choice(LANGUAGES), rng.randrange(10**6)
        ask = _Asker(schema, seed, language, rng, testing)
        try:
            text, sql = _MAKERS[kind](ask, kind)
        except _Unfit:
            continue
        return Question(text, sql, kind, language, schema, seed)
