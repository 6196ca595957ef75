"""What the page's routes send, and that its words exist in both languages; nothing here needs a browser."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

pytest.importorskip("fastapi", reason='serving needs its extra: pip install "lofi[serve]"')
pytest.importorskip("httpx", reason="the test client needs httpx")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from lofi.serve.page import ADDRESSES, FILES, FOLDER, INDEX, address, page_router

SCRIPTS = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".js")}
WORDS = {code: json.loads((FOLDER / f"{code}.json").read_text(encoding="utf-8")) for code in ("en", "vi")}
FORBIDDEN = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
HTML = (FOLDER / INDEX).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_router())
    return TestClient(app)


def test_the_files_that_are_served_are_those_of_the_folder():
    assert sorted(FILES) == sorted(path.name for path in FOLDER.iterdir())
    assert len(set(FILES)) == len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_sent_as_it_is_with_strict_headers(client, name):
    answer = client.get(address(name))
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    policy = dict(item.strip().split(" ", 1) for item in answer.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


@pytest.mark.parametrize(
    ("name", "media"),
    [
        ("index.html", "text/html"),
        ("app.js", "text/javascript"),
        ("style.css", "text/css"),
        ("vi.json", "application/json"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_the_type_of_a_file_is_its_own(client, name, media):
    assert client.get(address(name)).headers["content-type"].split(";")[0] == media


def test_an_unchanged_file_is_not_sent_again(client):
    tag = client.get("/").headers["etag"]
    assert tag == f'"{hashlib.sha256((FOLDER / INDEX).read_bytes()).hexdigest()[:32]}"'
    for asked in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/", headers={"If-None-Match": asked})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_says_what_get_would_send(client):
    got, told = client.get("/static/app.js"), client.head("/static/app.js")
    assert told.content == b""
    assert told.headers == got.headers


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/page.py",
        "/static/../page.py",
        "/static/%2e%2e/page.py",
        "/static/..%2fpage.py",
        "/static//app.js",
        "/static/APP.JS",
        "/index.html",
        "/static/index.html",
    ],
)
def test_nothing_but_the_known_addresses_is_served(client, path):
    assert path not in ADDRESSES
    assert client.get(path).status_code == 404


def test_the_page_changes_nothing(client):
    assert client.post("/").status_code == 405


def test_both_languages_have_the_same_keys_and_values_to_fill_in():
    assert list(WORDS["en"]) == list(WORDS["vi"])
    for key, english in WORDS["en"].items():
        forms = [english] if isinstance(english, str) else list(english.values())
        vietnamese = WORDS["vi"][key]
        assert isinstance(vietnamese, str), key  # Vietnamese has one form for every number
        assert {*re.findall(r"\{(\w+)\}", vietnamese)} == {*re.findall(r"\{(\w+)\}", forms[-1])}, key


def test_english_forms_are_one_and_other():
    forms = [set(words) for words in WORDS["en"].values() if not isinstance(words, str)]
    assert forms
    assert all(found == {"one", "other"} for found in forms)


def test_every_word_that_is_used_exists():
    said = set(re.findall(r'data-t(?:-label)?="([^"]+)"', HTML))
    for script in SCRIPTS.values():
        said |= set(re.findall(r'\bt\("([^"]+)"', script))
    assert sorted(said - set(WORDS["en"])) == []


def test_every_word_is_used():
    everything = HTML + "".join(SCRIPTS.values())
    beginnings = tuple(re.findall(r"`(\w+\.(?:\w+\.)*)\$\{", everything))  # a script completes these
    whole = set(re.findall(r'"([\w.]+)"', everything))
    whole |= {f"{key}.text" for key in whole}
    assert {"count.", "finish.", "settings."} <= set(beginnings)
    assert sorted(key for key in WORDS["en"] if key not in whole and not key.startswith(beginnings)) == []


def test_the_markup_says_in_english_what_the_words_say():
    for key, text in re.findall(r'data-t="([^"]+)"[^>]*>([^<]*)<', HTML):
        assert WORDS["en"][key] == text
    for text, key in re.findall(r'aria-label="([^"]+)" data-t-label="([^"]+)"', HTML):
        assert WORDS["en"][key] == text


def test_vietnamese_is_written_with_its_letters():
    plain = [key for key, text in WORDS["vi"].items() if text.isascii() and len(re.sub(r"\{\w+\}", "", text)) > 12]
    assert plain == []


def test_every_script_is_fetched_at_once_rather_than_when_it_is_reached():
    asked = re.findall(r'<(?:link rel="modulepreload" href|script[^>]* src)="([^"]+)"', HTML)
    assert sorted(asked) == sorted(map(address, SCRIPTS))


def test_nothing_comes_from_elsewhere_and_no_string_becomes_markup():
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, name
    for name, script in SCRIPTS.items():
        assert not re.search(FORBIDDEN, script), name
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]* src=)", HTML)


def test_every_script_says_what_it_is_and_stays_short():
    for name, script in SCRIPTS.items():
        assert script.startswith("// "), name
        assert script.count("\n") <= 300, name
        assert max(map(len, script.splitlines())) <= 140, name
