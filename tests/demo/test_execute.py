"""Answers are judged by their rows, and nothing a model writes can do harm."""

from __future__ import annotations

import sqlite3
import time

import pytest

from lofi.demo.dataset import make_rows
from lofi.demo.execute import MAX_ROWS, execution_accuracy, open_database, run_query, same_answer
from lofi.demo.schemas import database, parse_domain

SCHEMA = parse_domain("books: title=title, genre=noir|poetry, price=5-90, writer_id>writers\n writers: name=person")
ROW = {
    "completion": "select title from books where price > 40",
    "database": {"seed": 3, "tables": SCHEMA.to_dict()},
}


@pytest.fixture
def connection():
    connection = open_database(SCHEMA, 3)
    yield connection
    connection.close()


def test_the_database_holds_the_seeded_rows(connection):
    assert run_query(connection, "select * from books") == database(SCHEMA, 3)["books"]


@pytest.mark.parametrize(
    "harm",
    [
        "delete from books",
        "insert into books values (99, 'x', 'noir', 1, 1)",
        "update books set price = 0",
        "drop table books",
        "create table t (a)",
        "pragma table_info(books)",
        "attach database 'other.db' as other",
        "select 1; select 2",
        "vacuum",
        "begin",
        "select load_extension('x')",
        "select length(randomblob(900000000))",
        "select length(zeroblob(900000000))",
        "select hex(title) from books",
        "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n",
        "select title from books where \0",
        "nonsense",
    ],
)
def test_what_is_not_a_plain_select_is_refused_and_changes_nothing(connection, harm):
    before = run_query(connection, "select * from books")
    with pytest.raises(sqlite3.Error):
        run_query(connection, harm)
    assert run_query(connection, "select * from books") == before
    assert execution_accuracy(harm, ROW) == 0.0


def test_an_endless_query_is_stopped(connection):
    started = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        run_query(connection, "select count(*) from " + ", ".join(f"books b{i}" for i in range(9)))
    assert time.monotonic() - started < 30


def test_too_many_rows_are_an_error(connection):
    with pytest.raises(sqlite3.OperationalError, match=str(MAX_ROWS)):
        run_query(connection, "select a.id from books a, books b, books c")


def test_a_query_after_a_stopped_one_has_its_whole_allowance(connection):
    with pytest.raises(sqlite3.OperationalError):
        run_query(connection, "select count(*) from " + ", ".join(f"books b{i}" for i in range(9)))
    assert run_query(connection, "select count(*) from books") == [(len(database(SCHEMA, 3)["books"]),)]


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("select title from books where price > 40", 1.0),
        ("SELECT b.title FROM books AS b WHERE NOT b.price <= 40", 1.0),
        ("select title from books where price > 40 order by title", 1.0),
        ("select title from books where price < 40", 0.0),
        ("select title, price from books where price > 40", 0.0),
        ("select title from books", 0.0),
        ("select title from book where price > 40", 0.0),
        ("", 0.0),
    ],
)
def test_a_prediction_is_right_when_its_rows_are(prediction, right):
    assert execution_accuracy(prediction, ROW) == right


def test_order_counts_only_where_it_was_asked_for():
    row = {**ROW, "completion": "select title from books order by price desc limit 3"}
    assert execution_accuracy("select title from books order by price desc limit 3", row) == 1.0
    assert execution_accuracy("select title from books order by price limit 3", row) == 0.0
    assert same_answer([(2,), (1,)], [(1,), (2,)], ordered=False)
    assert not same_answer([(2,), (1,)], [(1,), (2,)], ordered=True)


def test_repeated_rows_count_as_often_as_they_come():
    assert not same_answer([(1,), (1,), (2,)], [(1,), (2,), (2,)], ordered=False)


def test_numbers_are_compared_to_nine_digits_and_texts_exactly():
    assert same_answer([(0.1 + 0.2,)], [(0.3,)], ordered=True)
    assert same_answer([(3,)], [(3.0,)], ordered=True)
    assert not same_answer([(1.00001,)], [(1.0,)], ordered=True)
    assert not same_answer([("Noir",)], [("noir",)], ordered=True)
    assert not same_answer([("3",)], [(None,)], ordered=True)


def wrong_versions(sql: str) -> list[str]:
    """What a model that half understood might have written."""
    swaps = [(" > ", " < "), (" < ", " > "), (" = ", " > "), ("avg(", "sum("), ("max(", "min("), ("min(", "avg("),
             ("sum(", "max("), (" desc", " asc"), (" asc", " desc"), ("limit 2", "limit 4"), ("limit 3", "limit 5"),
             ("count(*)", "sum( id )"), (" where ", " where not ")]  # fmt: skip
    return [sql.replace(a, b) for a, b in swaps if a in sql]


def test_a_wrong_query_seldom_gives_the_right_rows():
    rows = make_rows(80, 4, "test_seen") + make_rows(80, 4, "test_unseen")
    verdicts = [execution_accuracy(wrong, row) for row in rows for wrong in wrong_versions(row["completion"])]
    assert len(verdicts) > 150
    assert sum(verdicts) / len(verdicts) < 0.03
