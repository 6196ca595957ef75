"""The page in a real browser: what is asked, shown and done in each of its views."""

from __future__ import annotations

import re

from page_browser import answered, ask, backend, browser, eventually, expect, needs_chromium, server, show  # isort: skip
from page_backend import ANSWERS, ATTACK, BY_MODEL, MODEL, TOKEN  # isort: skip

pytestmark = needs_chromium
HIDE = """(now) => {
  Object.defineProperty(document, "hidden", {value: now, configurable: true});
  document.dispatchEvent(new Event("visibilitychange"));
}"""
__all__ = ["backend", "browser", "server", "show"]  # fixtures


def test_an_answer_streams_and_says_what_it_cost(show, backend):
    backend.pace = 0.1
    page = show()
    page.get_by_role("radio", name="sql-vi").check()
    ask(page, "Bao nhiêu dòng?")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Stop (Esc)")).to_be_visible()
    answer = answered(page)
    expect(answer.locator(".answer-body")).to_have_text(BY_MODEL["sql-vi"])
    expect(answer.locator(".facts")).to_have_text(
        re.compile(r"first\stoken\s[\d.]+\sms · [\d.]+\stokens/s · 17\sin,\s6\stokens\sout")
    )
    expect(page.locator("#said")).to_have_text("sql-vi has answered with 6 tokens.")
    eventually(page, lambda: backend.ends == ["whole"])
    asked = backend.asked[-1]
    assert asked["messages"] == [{"role": "user", "content": "Bao nhiêu dòng?"}]
    assert (asked["model"], asked["stream"], asked["stream_options"]) == ("sql-vi", True, {"include_usage": True})
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0, 1, 256)
    assert "seed" not in asked


def test_settings_and_earlier_turns_are_sent_and_the_answerer_may_change(show, backend):
    page = show()
    for label, value in (
        ("System prompt", "Be brief."),
        ("Temperature", "0.7"),
        ("Top p", "0.9"),
        ("Max tokens", "12"),
        ("Seed", "5"),
    ):
        page.get_by_label(label, exact=True).fill(value)
    ask(page, "one")
    answered(page)
    page.get_by_role("radio", name=MODEL).check()
    ask(page, "two")
    answered(page, 2)
    asked = backend.asked[-1]
    assert [asked[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")] == [MODEL, 0.7, 0.9, 12, 5]
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": BY_MODEL["sql-en"]},
        {"role": "user", "content": "two"},
    ]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_a_setting_out_of_range_is_said_and_nothing_is_sent(show, backend):
    page = show()
    page.get_by_label("Temperature").fill("3")
    ask(page, "hello")
    expect(page.get_by_text("A number from 0 to 2.")).to_be_visible()
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(page.locator("#prompt")).to_have_value("hello")
    assert backend.asked == []


def test_escape_stops_an_answer_and_keeps_what_came(show, backend):
    page = show()
    ask(page, "slow")
    expect(page.locator(".answer-body")).to_contain_text("word word")
    page.keyboard.press("Escape")
    answer = answered(page)
    expect(answer.locator(".facts")).to_contain_text("stopped")
    assert 2 <= answer.locator(".answer-body").inner_text().count("word") < 400
    eventually(page, lambda: backend.ends == ["left"])  # the server knows
    expect(page.locator("#prompt")).to_be_focused()
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".turn")).to_have_count(1)
    page.get_by_role("button", name="Stop (Esc)").click()
    answered(page)
    assert [asked["messages"][-1]["content"] for asked in backend.asked] == ["slow", "slow"]


def test_what_went_wrong_is_shown_in_the_servers_words(show):
    page = show()
    failing = {
        "busy": "the queue is full (try again in 7 s)",
        "failing": "the worker failed: ask again",
        "broken": "The connection ended before the answer did: ask again.",
    }
    for number, (prompt, said) in enumerate(failing.items(), 1):
        ask(page, prompt)
        expect(answered(page, number).get_by_role("alert")).to_have_text(said)


def test_an_adapter_that_is_gone_is_refused_and_nobody_answers_in_its_place(show, backend):
    page = show()
    page.get_by_role("radio", name="chatty").check()
    backend.adapters = backend.adapters[:2]
    ask(page, "hello")
    expect(answered(page).get_by_role("alert")).to_have_text(
        "no model or adapter is named 'chatty'; the nearest is 'sql-en'"
    )
    expect(page.locator(".answer-body")).to_have_text("")
    page.locator("#tab-live").click()  # polls
    page.locator("#tab-chat").click()
    expect(page.locator("#chat .pick-row.gone")).to_contain_text("no longer loaded")
    assert backend.asked[-1]["model"] == "chatty"


def test_markup_in_an_answer_is_text_and_code_has_its_form(show):
    page = show()
    ask(page, "attack")
    expect(answered(page).locator(".answer-body")).to_have_text(ATTACK)
    ask(page, "code")
    body = answered(page, 2).locator(".answer-body")
    expect(body.locator("pre")).to_have_text("SELECT name\nFROM singer;")
    expect(body.locator(".prose code")).to_have_text("all")
    assert page.evaluate("document.querySelectorAll('.log img, .log script, .log a').length") == 0
    assert page.evaluate("window.hacked") is None


def test_an_answer_is_copied_as_the_model_wrote_it(show):
    page = show(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "code")
    answered(page).locator(".answer-foot").get_by_role("button", name="Copy").click()
    expect(page.locator("#said")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == ANSWERS["code"]


def test_side_by_side_has_a_column_for_each_with_its_own_text_and_timing(show, backend):
    backend.pace = 0.1
    page = show("compare")
    ask(page, "How many?", "compare")
    expect(page.locator(".column[aria-busy=true]")).to_have_count(4)
    for name, text in BY_MODEL.items():
        column = page.locator(f".column[data-name={name}]")
        expect(column.locator(".column-body")).to_have_text(text)
        expect(column.locator(".facts")).to_contain_text("tokens/s")
    assert page.locator(".column").evaluate_all("all => all.map((one) => one.dataset.name)") == list(BY_MODEL)
    assert sorted(asked["model"] for asked in backend.asked) == sorted(BY_MODEL)
    english = page.locator(".column[data-name=sql-en]")
    expect(english.locator("mark")).to_have_text(["two"])
    expect(english.locator(".differs")).to_have_text(f"1 of 8 words (13 %) are not in the answer of {MODEL}.")
    expect(page.locator(".column[data-name=chatty] .differs")).to_have_text(f"The same as {MODEL}.")
    page.get_by_label("Mark what differs from").select_option("sql-en")
    expect(page.locator(f".column[data-name={MODEL}] mark")).to_have_text(["three"])
    page.get_by_label("Mark what differs from").select_option("nothing")
    expect(page.locator("mark")).to_have_count(0)


def test_side_by_side_one_that_fails_leaves_the_others_and_escape_stops_all(show, backend):
    page = show("compare")
    backend.adapters = backend.adapters[:2]
    ask(page, "How many?", "compare")
    expect(page.locator(".column[data-name=chatty] [role=alert]")).to_contain_text(
        "no model or adapter is named 'chatty'"
    )
    expect(page.locator(f".column[data-name={MODEL}] .state")).to_have_text("complete")
    ask(page, "slow", "compare")
    expect(page.locator(f".column[data-name={MODEL}]")).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(page.locator(f".column[data-name={MODEL}] .state")).to_have_text("stopped")
    for box in page.locator("#compare .pick-row input").all():
        box.uncheck()
    ask(page, "nobody", "compare")
    expect(page.get_by_text("Choose at least one to answer.")).to_be_visible()


def test_adapters_are_listed_with_what_they_are_and_do(show):
    page = show("adapters")
    row = page.locator("tr[data-name=sql-vi]")
    cells = row.locator("td").all_inner_texts()
    assert [cell.strip() for cell in cells[:8]] == [
        "sql-vi",
        "memory",
        "16",
        "2.6 MB",
        "down lm_head q",
        "13 %",
        "6",
        "480",
    ]
    assert row.locator("rect").get_attribute("width") == "12.50%"
    expect(page.locator(f"tr[data-name={MODEL}]")).to_contain_text("26 %")
    expect(page.get_by_text("3 adapters · 1 on the device · 1 in memory · 1 on disk · 4.6 MB")).to_be_visible()


def test_loading_shows_the_servers_reason_or_the_new_adapter(show, backend):
    page = show("adapters")
    fill = {"Name": "new", "Folder on the server": "runs/new", "Admin token": "wrong"}
    for label, value in fill.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.get_by_role("alert").filter(has_text="the admin token is wrong")).to_be_visible()
    page.get_by_label("Admin token").fill(TOKEN)
    page.get_by_label("Folder on the server").fill("dead")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.get_by_role("alert").filter(has_text="changes nothing: its B is zero everywhere")).to_be_visible()
    page.get_by_label("Folder on the server").fill("runs/new")
    page.keyboard.press("Enter")
    expect(page.get_by_text("new is loaded: rank 2, 1.3 MB.").first).to_be_visible()
    expect(page.locator("tr[data-name=new]")).to_be_visible()
    assert TOKEN not in page.url
    assert page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]") == ["{}", "{}"]


def test_unloading_needs_the_token_and_is_asked_about(show, backend):
    page = show("adapters")
    unload = page.get_by_role("button", name="Unload chatty")
    unload.click()
    expect(page.get_by_text("Unloading needs the admin token")).to_be_visible()
    expect(page.get_by_label("Admin token")).to_be_focused()
    page.get_by_label("Admin token").fill(TOKEN)
    page.get_by_label("Keep the token until this tab is closed").check()
    unload.click()
    expect(page.get_by_role("dialog", name="Unload chatty?")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    assert len(backend.adapters) == 3
    unload.click()
    page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(page.locator("tr[data-name=chatty]")).to_have_count(0)
    assert len(backend.adapters) == 2
    page.reload()
    expect(page.get_by_label("Admin token")).to_have_value(TOKEN)  # kept for the tab, as asked
    assert page.evaluate("localStorage.length") == 0


def test_without_an_admin_token_on_the_server_nothing_can_be_loaded(show, backend):
    backend.admin = False
    page = show("adapters")
    expect(page.get_by_text("Loading and unloading is off.")).to_be_visible()
    expect(page.get_by_label("Admin token")).to_be_hidden()
    expect(page.get_by_role("button", name="Unload chatty")).to_be_hidden()


def test_live_figures_move_while_the_page_is_visible_and_rest_while_it_is_hidden(show, backend):
    page = show("live")
    expect(page.locator("[data-tile=rate] .tile-value")).to_have_text(re.compile(r"^\d\d$"))
    expect(page.locator("[data-tile=first] .tile-values")).to_contain_text("71 ms")
    expect(page.locator("[data-tile=rows] svg")).to_have_attribute("aria-label", re.compile("running 3"))
    expect(page.locator("#live tbody tr").first).to_contain_text("48.0 tokens/s")
    before = page.locator("[data-tile=rate] .spark-line").get_attribute("d")
    expect(page.locator("[data-tile=rate] .spark-line")).not_to_have_attribute("d", before)
    page.evaluate(HIDE, True)
    page.wait_for_timeout(300)  # for a poll that was under way
    seen = backend.statuses
    page.wait_for_timeout(1300)
    assert backend.statuses == seen
    page.evaluate(HIDE, False)
    eventually(page, lambda: backend.statuses > seen)


def test_the_key_is_asked_for_once_and_kept_in_memory_alone(show, backend):
    backend.key = "the-key"
    page = show(ready=False)
    dialog = page.get_by_role("dialog", name="This server needs a key")
    expect(dialog.get_by_label("Key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("this server needs its key")
    page.keyboard.press("Escape")
    expect(page.locator("#health")).to_have_attribute("data-state", "locked")
    page.get_by_role("button", name="Enter the key").click()
    page.keyboard.type("the-key")
    page.keyboard.press("Enter")
    expect(page.locator("#health")).to_have_attribute("data-state", "ready")
    ask(page, "hello")
    expect(answered(page).locator(".answer-body")).to_have_text(BY_MODEL["sql-en"])
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_a_server_that_stops_or_is_gone_is_said_so(show, backend):
    backend.draining = True
    page = show("live", ready=False)
    expect(page.locator("#banner")).to_contain_text("The server is stopping")
    page.context.route("**/v1/lofi/status", lambda route: route.fulfill(status=502, body="<html>bad gateway</html>"))
    told = "What is shown may be old. The server answered with status 502 and no reason."
    expect(page.locator("#banner-text")).to_have_text(told)
    expect(page.locator("#banner-key")).to_be_hidden()


def test_events_are_read_whole_wherever_the_stream_is_cut(show):
    sent = ': note\r\ndata: {"a": "ơ😀"}\r\n\r\nevent: x\ndata: one\ndata:two\n\ndata: [DONE]\n\n'
    read = """async ([sent, size]) => {
      const { events } = await import("/static/answer.js");
      const bytes = new TextEncoder().encode(sent);
      const stream = new ReadableStream({ start(to) {
        for (let at = 0; at < bytes.length; at += size) to.enqueue(bytes.slice(at, at + size));
        to.close();
      } });
      const found = [];
      for await (const data of events(stream)) found.push(data);
      return found;
    }"""
    page = show()
    for size in (1, 2, 3, 7, 1000):
        assert page.evaluate(read, [sent, size]) == ['{"a": "ơ😀"}', "one\ntwo", "[DONE]"]


def test_a_difference_is_what_no_common_order_of_words_covers(show):
    read = """async ([reference, text]) => {
      const { difference } = await import("/static/difference.js");
      const { pieces, count, total } = difference(reference, text);
      const fresh = pieces.filter(([, isNew]) => isNew).map(([piece]) => piece);
      return [fresh, count, total, pieces.map(([piece]) => piece).join("")];
    }"""
    page = show()
    cases = {
        ("a b c d", "a x  c\nd"): (["x"], 1, 4),
        ("a b", "b a"): (["b"], 1, 2),
        ("", "a b"): (["a", "b"], 2, 2),
        ("a b c", ""): ([], 0, 0),
        ("a a b", "a b b"): (["b"], 1, 3),
    }
    for (reference, text), (fresh, count, total) in cases.items():
        found = page.evaluate(read, [reference, text])
        assert found[1:] == [count, total, text]
        assert sorted(found[0]) == sorted(fresh) or (reference, text) == (
            "a b",
            "b a",
        )  # either word may be the one kept
