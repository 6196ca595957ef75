"""The page in a real browser: who can use it, where and how (languages, keyboard, phone, light and dark, contrast)."""

from __future__ import annotations

import json

from page_browser import VIEWS, answered, ask, backend, browser, expect, needs_chromium, server, show  # isort: skip
from page_backend import BY_MODEL, MODEL  # isort: skip

from lofi.serve.page import FOLDER

pytestmark = needs_chromium
__all__ = ["backend", "browser", "server", "show"]  # fixtures

SHOWN = """() => {
  const said = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    if (!node.parentElement.closest("noscript, script")) said.push(node.textContent.trim());
  }
  for (const node of document.querySelectorAll("*")) {
    for (const name of ["aria-label", "title", "placeholder", "data-head"]) said.push(node.getAttribute(name) ?? "");
  }
  return said.filter(Boolean);
}"""
WIDER = """() => [document.documentElement.scrollWidth - innerWidth,
  ...[...document.querySelectorAll(".view:not([hidden]) *")].filter((node) => {
    const box = node.getBoundingClientRect();
    const scrolls = node.closest(".columns, .table, pre, .unseen, .stacks thead");
    return !scrolls && box.width && (box.right > innerWidth + 1 || box.left < -1);
  }).map((node) => node.outerHTML.slice(0, 80))]"""
PALE = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!text || !node.checkVisibility() || node.closest("[disabled], .unseen, option")) continue;
    const [one, two] = [light(rgba(getComputedStyle(node).color)), light(under(node))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (two + 0.05);
    if (ratio < 4.5) found.push([ratio.toFixed(2), node.className, node.textContent.slice(0, 40)]);
  }
  return found;
}"""
UNNAMED = """() => {
  const text = (nodes) => [...(nodes ?? [])].map((node) => node?.textContent ?? "").join("");
  const name = (node) => (node.getAttribute("aria-label") ?? "") + text(node.labels)
    + (node.matches("button") ? text([node]) : "")
    + text((node.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id)));
  return [...document.querySelectorAll("button, input, select, textarea, [role=tab], [tabindex='0']")]
    .filter((node) => !node.matches("pre") && !name(node).trim()).map((node) => node.outerHTML.slice(0, 90));
}"""


def through(page):
    """Every view in turn."""
    for view in VIEWS:
        page.locator(f"#tab-{view}").click()
        yield view


def test_vietnamese_is_said_everywhere_and_remembered(show, backend):
    english = json.loads((FOLDER / "en.json").read_text(encoding="utf-8"))
    vietnamese = json.loads((FOLDER / "vi.json").read_text(encoding="utf-8"))
    foreign = {text for text in english.values() if isinstance(text, str) and text not in vietnamese.values()}
    page = show()
    ask(page, "one")
    answered(page)
    page.locator("#tab-compare").click()
    ask(page, "two", "compare")
    expect(page.locator(".column[aria-busy=false]")).to_have_count(4)
    assert foreign & set(page.evaluate(SHOWN))
    page.get_by_role("button", name="Tiếng Việt").click()
    expect(page.locator("html")).to_have_attribute("lang", "vi")
    for _ in through(page):
        assert not foreign & set(page.evaluate(SHOWN))
    expect(page.locator(".turn .facts")).to_contain_text("token đầu sau")
    expect(page.locator(".column .differs").last).to_have_text(f"Giống hệt {MODEL}.")
    expect(page.locator("tr[data-name=sql-en]")).to_contain_text("1,3 MB")
    page.reload()
    expect(page.locator("#tab-chat")).to_have_text("Trò chuyện")


def test_the_browsers_language_is_where_the_page_starts(show):
    page = show(locale="vi-VN")
    expect(page.locator("html")).to_have_attribute("lang", "vi")
    expect(page.get_by_role("tab", selected=True)).to_have_text("Trò chuyện")
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("tab", selected=True)).to_have_text("Chat")


def test_light_and_dark_follow_the_system_until_chosen_and_every_text_is_readable(show):
    ink = "getComputedStyle(document.body).backgroundColor"
    page = show(color_scheme="light")
    ask(page, "code")
    answered(page)
    ask(page, "failing")
    answered(page, 2)
    page.locator("#tab-compare").click()
    ask(page, "two", "compare")
    expect(page.locator(".column[aria-busy=false]")).to_have_count(4)
    light = page.evaluate(ink)
    for _ in through(page):
        assert page.evaluate(PALE) == []
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ink)
    assert dark != light
    for _ in through(page):
        assert page.evaluate(PALE) == []
    page.get_by_role("button", name="Appearance: as the system").click()
    assert page.evaluate(ink) == light  # chosen, whatever the system says
    page.reload()
    assert page.evaluate(ink) == light
    page.get_by_role("button", name="Appearance: light").click()
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ink) == dark


def test_the_readability_measure_sees_pale_text(show):
    page = show()
    page.evaluate("document.querySelector('.empty p').style.color = '#999999'")
    assert len(page.evaluate(PALE)) == 1


def test_everything_works_by_keyboard_alone(show, backend):
    page = show()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    expect(answered(page).locator(".answer-body")).to_have_text(BY_MODEL["sql-en"])
    assert backend.asked[-1]["messages"][-1]["content"] == "first line\nsecond line"
    page.locator("a.skip").focus()
    order = ["skip"]
    while order[-1] != "setting-seed":
        assert len(order) < 40
        page.keyboard.press("Tab")
        order.append(page.evaluate("(node => node.id || node.name || node.className)(document.activeElement)"))
        ringed = page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        assert ringed or order[-1] in ("prompt", "answerer")  # what they lie in shows the focus
    wanted = [
        "skip",
        "tab-chat",
        "theme",
        "scroller",
        "prompt",
        "answerer",
        "system",
        "setting-temperature",
        "setting-seed",
    ]
    assert [name for name in order if name in wanted] == wanted
    page.locator("#tab-chat").focus()
    for key, view in (
        ("ArrowRight", "compare"),
        ("End", "live"),
        ("ArrowRight", "chat"),
        ("ArrowLeft", "live"),
        ("Home", "chat"),
    ):
        page.keyboard.press(key)
        expect(page.locator(f"#tab-{view}")).to_be_focused()
        expect(page.locator(f"#{view}")).to_be_visible()
        assert page.locator("[role=tab][tabindex='0']").count() == 1
    page.get_by_role("radio", name="sql-en").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".answerer")).to_contain_text("sql-vi")
    page.keyboard.press("Shift+Tab")
    page.locator("a.skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()


def test_every_control_has_a_name(show):
    page = show()
    ask(page, "code")
    answered(page)
    for view in through(page):
        assert page.evaluate(UNNAMED) == [], view


def test_enter_that_ends_a_composition_sends_nothing(show, backend):
    page = show()
    page.locator("#prompt").fill("tiếng")
    compose = (
        "(node) => node.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    page.locator("#prompt").evaluate(compose)
    expect(page.locator(".turn")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(1)


def test_a_phone_shows_every_view_without_scrolling_sideways(show):
    page = show(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, locale="vi-VN")
    ask(page, "code")
    answered(page)
    page.locator("#tab-compare").tap()
    ask(page, "two", "compare")
    expect(page.locator(".column[aria-busy=false]")).to_have_count(4)
    for _ in through(page):
        assert page.evaluate(WIDER) == [0]
    page.locator("#tab-chat").tap()
    expect(page.locator("#system")).to_be_hidden()
    page.locator("#chat .side-open").tap()
    expect(page.locator("#system")).to_be_visible()
    assert page.evaluate(WIDER) == [0]
    page.get_by_role("radio", name="chatty").check()
    page.get_by_label("Nhiệt độ").fill("3")
    page.keyboard.press("Escape")
    expect(page.locator("#system")).to_be_hidden()
    expect(page.locator("#chat .side-open")).to_be_focused()
    expect(page.locator(".answerer")).to_contain_text("chatty")
    ask(page, "nothing is sent while a setting is wrong")
    expect(page.get_by_label("Nhiệt độ")).to_be_focused()
    expect(page.get_by_text("Một số từ 0 đến 2.")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(1)


def test_nothing_moves_for_those_who_do_not_want_it(show, backend):
    backend.pace = 0.02
    moving = "getComputedStyle(document.querySelector('.answer-body'), '::after').animationName"
    for wish, name in (("reduce", "none"), ("no-preference", "breathe")):
        page = show(reduced_motion=wish)
        ask(page, "slow")
        expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
        assert page.evaluate(moving) == name
        page.keyboard.press("Escape")


def test_many_adapters_are_filtered_and_drawn_in_part(show, backend):
    first = backend.adapters[0]
    backend.adapters = [{**first, "name": f"team-{number:04}", "state": "disk", "share": 0} for number in range(1000)]
    page = show()
    expect(page.locator("#chat .pick-row")).to_have_count(200)
    expect(page.locator("#chat").get_by_text("200 of 1,001 are shown")).to_be_visible()
    page.locator("#chat").get_by_role("searchbox", name="Filter by name").fill("0999")
    expect(page.locator("#chat .pick-row")).to_have_count(1)
    page.get_by_role("radio", name="team-0999").check()
    ask(page, "hello")
    answered(page)
    assert backend.asked[-1]["model"] == "team-0999"
    page.locator("#tab-adapters").click()
    expect(page.locator("#adapters tbody tr")).to_have_count(201)
    page.locator("#adapters").get_by_role("searchbox").fill("0999")
    expect(page.locator("#adapters tbody tr")).to_have_count(1)
