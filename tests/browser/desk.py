"""A headless Chromium with the page open, and what a person does with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_MS = 60_000
PHONE = {"width": 390, "height": 844}


def require_chromium() -> str:
    """The path of the system's Chromium. Skips the test if there is none, or no playwright."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium. Until it ends, the thread has a running event loop: `asyncio.run` fails within."""
    path = require_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(slots=True)
class Desk:
    """The page, and what has been seen of it.

    Attributes:
        requests: all that the page has sent.
        complaints: errors of scripts, and of the console.
    """

    page: Page
    base: str
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self) -> None:
        self.page.goto(self.base)
        self.page.wait_for_function("document.querySelector('#presets button')", timeout=WAIT_MS)

    def __getitem__(self, name: str) -> Locator:
        """The element with this id."""
        return self.page.locator(f"#{name}")

    @property
    def text(self) -> str:
        return self["text"].input_value()

    @property
    def models_words(self) -> str:
        return "".join(self.page.locator("#paper .model").all_text_contents())

    def write(self, text: str) -> None:
        """Types a text at the end of the document, at once."""
        self["text"].focus()
        self.page.keyboard.press("Control+End")
        self.page.keyboard.insert_text(text)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def settle(self, word: str = "Done") -> None:
        """Waits until a continuation has ended."""
        self.wait("word => document.querySelector('#say').textContent.startsWith(word)", word)

    def go_on(self, **sampling: object) -> None:
        """Continues with these settings, and waits for the end."""
        self.set(**sampling)
        self.hush()
        self["text"].focus()
        self.press("Control+Enter")
        self.settle()

    def begin_to_go_on(self, text: str) -> None:
        """Begins a long continuation of a text, and waits until some of it has come."""
        self.write(text)
        self.set(max_tokens=1000)
        self["go"].click()
        self.wait("length => document.querySelector('#text').value.length > length", len(text) + 10)

    def again(self) -> None:
        """Tries again, and waits for the end."""
        self.hush()
        self["text"].focus()
        self.press("Control+r")
        self.settle()

    def hush(self) -> None:
        """Forgets what a screen reader was told last, which `settle` waits for."""
        self["say"].evaluate("one => { one.textContent = ''; }")

    def set(self, **sampling: object) -> None:
        if sampling:
            self.unfold("sampling")
        for name, value in sampling.items():
            self.page.locator(f"#sampling [name={name}]").fill(str(value))

    def unfold(self, panel: str) -> None:
        self.page.locator(f"details[data-panel={panel}]").evaluate("one => { one.open = true; }")

    def wait(self, condition: str, argument: object = None) -> None:
        """Waits until a function of JavaScript says so."""
        self.page.wait_for_function(condition, arg=argument, timeout=WAIT_MS)

    def bodies(self, path: str = "completions") -> list[dict[str, Any]]:
        """The bodies that were sent to a path that ends so."""
        posts = (one for one in self.requests if one.method == "POST" and one.url.endswith(path))
        return [json.loads(one.post_data or "") for one in posts]

    def caret(self, at: int, end: int | None = None) -> None:
        self["text"].evaluate("(one, [at, end]) => one.setSelectionRange(at, end)", [at, at if end is None else end])


@contextmanager
def desk(browser: Browser, base: str, is_open: bool = True, **options: Any) -> Iterator[Desk]:
    """A page of a context of its own: nothing that was kept is there.

    Args:
        options: of the browser's context, such as `viewport` and `color_scheme`.
    """
    context = browser.new_context(**({"viewport": {"width": 1360, "height": 900}} | options))
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    one = Desk(page, base)
    page.on("request", lambda request: one.requests.append(request))
    page.on("pageerror", lambda error: one.complaints.append(str(error)))
    page.on("console", lambda message: one.complaints.append(message.text) if message.type == "error" else None)
    try:
        if is_open:
            one.open()
        yield one
    finally:
        context.close()


def answer_with(page: Page, path: str, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
    """Answers the page's requests for a path in the server's place, until `page.unroute(path)`."""
    page.route(path, lambda route: route.fulfill(status=status, json=body, headers=dict(headers or {})))
