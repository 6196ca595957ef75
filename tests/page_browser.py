"""A browser for the page's tests: the system's Chromium, headless, and what its tests do again and again.

No console error, no refused resource and no request to another origin is allowed in any test; each has a context of its
own, so that nothing is remembered from one to the next. The browser lives as long as one module: playwright keeps an
event loop running in the main thread meanwhile, which other modules may not find there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='serving needs its extra: pip install "lofi[serve]"')
pytest.importorskip("uvicorn", reason='serving needs its extra: pip install "lofi[serve]"')
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

from playwright.sync_api import Browser, Locator, Page, expect  # noqa: E402

from page_backend import Backend, backend_app, running  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
VIEWS = ("chat", "compare", "adapters", "live")
expect.set_options(timeout=8000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], headless=True)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Backend]]:
    backend = Backend()
    with running(backend_app(backend)) as url:
        yield url, backend


@pytest.fixture
def backend(server: tuple[str, Backend]) -> Backend:
    server[1].__init__()  # the same server, as new
    return server[1]


@pytest.fixture
def show(browser: Browser, server: tuple[str, Backend], backend: Backend) -> Iterator[Callable[..., Page]]:
    """Opens the page; at the end, whatever the browser complained of is a failure."""
    opened, faults = [], []

    def open_page(view: str = "chat", *, ready: bool = True, url: str = server[0], **context: Any) -> Page:
        made = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, "locale": "en-US", **context})
        made.set_default_timeout(8000)
        page = made.new_page()
        opened.append(made)
        watch(page, url, faults)
        page.goto(f"{url}/#{view}")
        if ready:
            expect(page.locator("#health")).to_have_attribute("data-state", "ready")
        return page

    yield open_page
    for context in opened:
        context.close()
    assert faults == []


def watch(page: Page, url: str, faults: list[str]) -> None:
    """Collects errors of the page, of its policy, and requests that leave its origin."""
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda request: request.url.startswith(f"{url}/") or faults.append(f"elsewhere: {request.url}"))
    page.on("console", lambda message: _complain(message, faults))


def _complain(message: Any, faults: list[str]) -> None:
    # the browser itself logs every request that the server refused
    if message.type in ("error", "warning") and "responded with a status of" not in message.text:
        faults.append(f"{message.type}: {message.text}")


def ask(page: Page, prompt: str, view: str = "chat") -> None:
    page.locator("#prompt" if view == "chat" else "#compare-prompt").fill(prompt)
    page.keyboard.press("Enter")


def eventually(page: Page, holds: Callable[[], bool]) -> None:
    """Waits until the server's side has come to something."""
    for _ in range(400):
        if holds():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not come to that")


def answered(page: Page, number: int = 1) -> Locator:
    """The answer of a turn, complete."""
    answer = page.locator(f".turn:nth-child({number}) .answer")
    expect(answer).to_have_attribute("aria-busy", "false")
    return answer
