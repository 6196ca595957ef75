"""The page in a real browser against the real server: a tiny model with two adapters, nothing canned."""

from __future__ import annotations

from page_browser import answered, ask, backend, browser, expect, needs_chromium, server, show  # isort: skip

import httpx
import pytest

pytestmark = needs_chromium
__all__ = ["backend", "browser", "server", "show"]  # fixtures
PROMPT = "count to three"
ROOM = 12


@pytest.fixture(scope="module")
def whole(real_server) -> dict[str, str]:
    """What the server answers under each name when it is asked for the whole answer."""
    url, _ = real_server
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": ROOM, "temperature": 0}
    found = {}
    for name in ("small", "red", "blue"):
        told = httpx.post(f"{url}/v1/chat/completions", json={**asked, "model": name}, timeout=60).json()
        found[name] = told["choices"][0]["message"]["content"]
    assert len(set(found.values())) == 3
    return found


def shown(text: str) -> str:
    """A text as the browser's innerText gives it: without spaces at its ends."""
    return text.strip()


def test_chat_and_side_by_side_show_what_the_server_answers(show, real_server, whole):
    page = show(url=real_server[0])
    page.get_by_label("Max tokens").fill(str(ROOM))
    page.get_by_role("radio", name="blue").check()
    ask(page, PROMPT)
    assert shown(answered(page).locator(".answer-body").inner_text()) == shown(whole["blue"])
    expect(page.locator(".turn .facts")).to_contain_text("tokens/s")
    page.locator("#tab-compare").click()
    ask(page, PROMPT, "compare")
    expect(page.locator(".column[aria-busy=false]")).to_have_count(3)
    columns = {name: page.locator(f".column[data-name={name}] .column-body").inner_text() for name in whole}
    assert {name: shown(text) for name, text in columns.items()} == {name: shown(text) for name, text in whole.items()}
    page.locator("#tab-live").click()
    expect(page.locator("#live tbody tr").first).to_contain_text(f"{ROOM}")
    expect(page.locator("[data-tile=first] .tile-value").first).to_contain_text("ms")


def test_adapters_are_refused_loaded_and_unloaded(show, real_server):
    page = show("adapters", url=real_server[0])
    expect(page.locator("tr[data-name=red]")).to_contain_text("q v")
    load = page.get_by_role("button", name="Load", exact=True)
    for label, value in (("Name", "again"), ("Folder on the server", "../outside"), ("Admin token", "letmein")):
        page.get_by_label(label, exact=True).fill(value)
    load.click()
    expect(page.locator(".message")).to_contain_text("not inside the adapter folder")
    page.get_by_label("Folder on the server").fill("red")
    load.click()
    expect(page.locator(".message")).to_contain_text("again is loaded: rank 3")
    page.get_by_role("button", name="Unload again").click()
    page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(page.locator("tr[data-name=again]")).to_have_count(0)
    expect(page.locator(".message")).to_have_text("again is unloaded.")
