"""What the demo asks about: names do not leak from the test into training, and databases are reproducible."""

from __future__ import annotations

import random
import sqlite3

import pytest

from lofi.demo.pools import POOLS, TRAIN_DOMAINS, UNSEEN_DOMAINS
from lofi.demo.schemas import (
    VARIANTS,
    Schema,
    database,
    fixed_schemas,
    for_test,
    held_out_words,
    parse_domain,
    random_schema,
    schema_words,
)


def names_of(domains: tuple[str, ...]) -> set[str]:
    return {name for domain in domains for name in parse_domain(domain).names()}


def test_a_domain_reads_as_tables_columns_and_links():
    schema = parse_domain("books: title=title, price=5-90, author_id>authors\n       authors: name=person")
    assert schema.text() == "books(id, title, price, author_id), authors(id, name)"
    assert [c.kind for c in schema.table("books").columns] == ["key", "label", "number", "link"]
    assert Schema.from_dict(schema.to_dict()) == schema


def test_unseen_domains_share_no_table_and_no_column_with_the_trained_ones():
    assert not names_of(TRAIN_DOMAINS) & names_of(UNSEEN_DOMAINS)


def test_no_random_schema_uses_a_held_out_word():
    rng = random.Random(5)
    words = {part for _ in range(3000) for name in random_schema(rng).names() for part in (name, *name.split("_"))}
    words |= {word.removesuffix("s") for word in words}
    assert not (words - {"id"}) & held_out_words()
    assert {"planet", "planets", "torque", "doctor"} <= held_out_words()


def test_every_column_but_ids_and_links_is_named_once_in_a_schema():
    rng = random.Random(1)
    schemas = [*fixed_schemas("train"), *fixed_schemas("unseen"), *(random_schema(rng) for _ in range(500))]
    for schema in schemas:
        names = [c.name for t in schema.tables for c in t.of_kind("label", "text", "number")]
        names += [t.name for t in schema.tables] + list({c.name for t in schema.tables for c in t.of_kind("link")})
        assert len(names) == len(set(names)), schema.text()


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_every_fixed_schema_has_a_link_between_two_of_its_tables(split):
    schemas = fixed_schemas(split)
    assert len(schemas) == VARIANTS * len(TRAIN_DOMAINS if split == "train" else UNSEEN_DOMAINS)
    for schema in schemas:
        links = [c.holds[1:] for t in schema.tables for c in t.of_kind("link")]
        assert links and set(links) <= {t.name for t in schema.tables}, schema.text()


def test_a_database_is_the_same_for_the_same_seed_and_differs_for_another():
    schema = fixed_schemas("train")[0]
    assert database(schema, 3) == database(schema, 3) != database(schema, 4)


def test_links_point_at_rows_that_exist_and_labels_do_not_repeat():
    for schema in fixed_schemas("unseen"):
        rows = database(schema, 11)
        for table in schema.tables:
            for place, column in enumerate(table.columns):
                values = [row[place] for row in rows[table.name]]
                if column.kind == "link":
                    assert set(values) <= {row[0] for row in rows[column.holds[1:]]}
                if column.kind in ("label", "key"):
                    assert len(set(values)) == len(values)


def test_a_third_of_all_literals_is_kept_for_the_tests():
    assert [n for n in range(9) if for_test(n)] == [2, 5, 8]
    first, second = (words.split() for words in POOLS["title"])
    titles = [f"{a} {b}" for a in first for b in second]
    assert 0.2 < sum(map(for_test, titles)) / len(titles) < 0.45


def test_the_word_pool_is_wide_and_every_word_is_a_name_in_sql():
    connection = sqlite3.connect(":memory:")
    words = schema_words()
    assert len(set(words)) == len(words) > 750
    for word in words:
        connection.execute(f"create table {word}s ({word} text, {word}_id integer)")
        connection.execute(f"select {word}, max( {word} ) from {word}s where {word} = 1 group by {word}")
    connection.close()
