"""Makes the pictures of the page for the docs: `python -m tests.browser.screenshots`. It writes `docs/images/`.

The pages are those of the tests: a server that pretends, and the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.browser.desk import PHONE, Desk, chromium, desk
from tests.browser.pretend import PretendServer, pretend_server, restarting

if TYPE_CHECKING:
    from playwright.sync_api import Browser

IMAGES = Path(__file__).parents[2] / "docs" / "images"
MAX_BYTES = 150_000
BEGIN = "The old man sat in the boat and looked at the water."
WIDE = {"width": 1280, "height": 760}


def _written(page: Desk, _: PretendServer) -> None:
    page.write(BEGIN)
    page.go_on(max_tokens=40)
    page.press("Control+z")
    page.write(" Nobody was with him.")
    page.go_on(max_tokens=48)


def _heat(page: Desk, server: PretendServer) -> None:
    _written(page, server)
    page["heat"].select_option("probability")
    page["score"].click()
    page.wait("() => document.querySelectorAll('#paper .t.user').length")
    page["text"].focus()
    page.caret(len(BEGIN) + 29)
    page.press("Alt+ArrowDown")
    page["popover"].wait_for()


def _choices(page: Desk, _: PretendServer) -> None:
    page.write(BEGIN)
    page.go_on(n=3, max_tokens=24)


def _lost(page: Desk, server: PretendServer) -> None:
    _written(page, server)
    server.pipelines.documents_now = (restarting(),)
    page.page.locator(".lost").wait_for()


Steps = Callable[[Desk, PretendServer], None]
PICTURES: dict[str, tuple[Steps, dict[str, Any]]] = {
    "page-light": (_heat, {"viewport": WIDE}),
    "page-dark": (_written, {"viewport": WIDE, "color_scheme": "dark"}),
    "page-choices": (_choices, {"viewport": WIDE}),
    "page-lost-stage": (_lost, {"viewport": WIDE}),
    "page-phone": (_written, {"viewport": PHONE}),
    "page-phone-dark": (_heat, {"viewport": PHONE, "color_scheme": "dark"}),
}


def take(browser: Browser, server: PretendServer, name: str, directory: Path) -> Path:
    """Takes one of `PICTURES`. The pipeline stands still, so that the picture is the same each time."""
    steps, options = PICTURES[name]
    server.reset()
    server.story.pace_s = 0.02
    with desk(browser, server.base, reduced_motion="reduce", **options) as page:
        page.page.locator(".stage").nth(1).wait_for(state="attached")
        steps(page, server)
        page.wait("() => document.querySelector('#documents option')?.textContent.startsWith('The old man')")
        path = directory / f"{name}.png"
        page.page.screenshot(path=path, caret="initial")
    return path


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with chromium() as browser, pretend_server() as server:
        for name in PICTURES:
            path = take(browser, server, name, IMAGES)
            size = path.stat().st_size
            print(f"{path}: {size} bytes" + (" (too many)" if size > MAX_BYTES else ""))


if __name__ == "__main__":
    main()
