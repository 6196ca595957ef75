"""Questions: the SQL runs, says what the sentence says, and can be copied name by name from the prompt."""

from __future__ import annotations

import random
import re
import string

import pytest

from lofi.demo.execute import open_database, run_query
from lofi.demo.grammar import KINDS, LANGUAGES, make_question
from lofi.demo.schemas import fixed_schemas, for_test, random_schema
from lofi.demo.sentences import AGGREGATES, COMPARISONS, DIRECTIONS, EXTREMES, SENTENCES, TEXT_EQUALS


@pytest.fixture(scope="module")
def questions():
    rng = random.Random(2)
    fixed = fixed_schemas("train")
    schemas = [rng.choice(fixed) if i % 2 else random_schema(rng) for i in range(1200)]
    return [make_question(schema, rng, testing=i % 3 == 0) for i, schema in enumerate(schemas)]


def test_every_question_has_sql_that_runs(questions):
    for question in questions:
        connection = open_database(question.schema, question.seed)
        run_query(connection, question.sql)
        connection.close()


def test_every_kind_is_asked_in_both_languages(questions):
    assert {(q.kind, q.language) for q in questions} == {(k, lang) for k in KINDS for lang in LANGUAGES}


def test_every_name_in_the_sql_stands_after_a_space_in_the_prompt_too(questions):
    for question in questions:
        prompt = f"Tables: {question.schema.text()}\n{question.text}"
        for name in question.schema.names():
            if re.search(rf"\b{name}\b", re.sub(r"'.*?'", "", question.sql)):
                assert f" {name}" in prompt and f" {name}" in question.sql, question


def test_every_literal_of_the_sql_stands_in_the_question_as_it_is_written_there(questions):
    for question in questions:
        for literal in re.findall(r"'.*?'|\b\d+\b", question.sql):
            assert literal in question.text, question


def test_tests_and_training_use_different_literals(questions):
    for place, question in enumerate(questions):
        where = question.sql.partition(" where ")[2]
        for literal in re.findall(r"'(.*?)'|\b(\d+)\b", where):
            value = literal[0] or int(literal[1])
            assert for_test(value) == (place % 3 == 0), question


def test_the_same_generator_state_gives_the_same_question():
    schema = fixed_schemas("unseen")[3]
    first, second = (make_question(schema, random.Random(9), testing=True) for _ in range(2))
    assert first == second


def test_both_languages_have_the_same_kinds_and_every_sentence_names_the_same_fields():
    def fields(text: str) -> set[str]:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field}

    for table in (AGGREGATES, COMPARISONS, EXTREMES, DIRECTIONS, SENTENCES):
        assert set(table["en"]) == set(table["vi"])
        for key in table["en"]:
            said = {frozenset(fields(text)) for language in LANGUAGES for text in table[language][key]}
            assert len(said) == 1, (key, said)
    assert {frozenset(fields(t)) for language in LANGUAGES for t in TEXT_EQUALS[language]} == {frozenset("cv")}


def test_no_sentence_starts_with_a_name():
    for language in LANGUAGES:
        assert not [text for texts in SENTENCES[language].values() for text in texts if text.startswith("{")]
