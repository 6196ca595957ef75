"""Go's templates as Ollama renders them: what is known is rendered as Go does, what is not is refused by name."""

from __future__ import annotations

import pytest

from lofi.errors import DataError
from lofi.export.go_template import collated, literal, render

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "user", "content": "d"},
]


def test_consecutive_messages_of_a_role_are_joined_and_system_messages_gathered():
    values = collated([*TALK, {"role": "system", "content": "T"}])
    assert [(m["Role"], m["Content"]) for m in values["Messages"]] == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c\n\nd"),
        ("system", "T"),
    ]
    assert values["System"] == "S\n\nT"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain }} text", "plain }} text"),
        ("{{ .System }}|{{.System}}", "S|S"),
        ("a \n{{- .System -}}\n b", "aSb"),
        ("{{/* a note */}}x{{- /* another */ -}} y", "xy"),
        ('{{ "{{" }} {{ `a\\n` }} {{ "t\\"\\n" }}', '{{ a\\n t"\n'),
        ("{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}", "[system:S][user:a][assistant:b][user:c\n\nd]"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }} {{ end }}", "0system 1user 2assistant 3user "),
        ("{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}last{{ end }}{{ end }}", "last"),
        ("{{ range .Tools }}x{{ else }}none{{ end }}", "none"),
        (
            '{{ range .Messages }}{{ if eq .Role "user" "system" }}1{{ else if ne .Role "x" }}2{{ end }}{{ end }}',
            "1121",
        ),
        ("{{ if and .System (not .Tools) }}y{{ else }}n{{ end }}{{ if or .Tools .System }}y{{ end }}", "yy"),
        ("{{ $x := 3 }}{{ if gt $x 2 }}{{ $x }}{{ end }}{{ true }}", "3true"),
        ("{{ (index .Messages 1).Content }}", None),
        ("{{ .Prompt }}", ""),
    ],
)
def test_a_template_is_rendered_as_go_renders_it(template, text):
    if text is None:
        with pytest.raises(DataError):
            render(template, TALK)
        return
    assert render(template, TALK) == text


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ with .System }}x{{ end }}", "with"),
        ('{{ printf "%s" .System }}', "printf"),
        ("{{ .System | len }}", "a pipe"),
        ("{{ if .System }}x", "no {{ end }}"),
        ("x{{ end }}", "belongs to nothing"),
        ("{{ $nothing }}", r"\$nothing"),
        ("{{ }}", "empty action"),
    ],
)
def test_what_is_not_known_is_refused_by_name(template, named):
    with pytest.raises(DataError, match=named):
        render(template, TALK)


def test_text_that_opens_an_action_is_written_as_text():
    assert render(literal("a {{ .System }} b {{"), TALK) == "a {{ .System }} b {{"
