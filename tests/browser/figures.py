"""What the page weighs: bytes, requests, the first paint, errors of the console. `python -m tests.browser.figures`.

It measures a server that only pretends (`tests.browser.pretend`). The last line is one JSON document.
"""

from __future__ import annotations

import json
from statistics import median
from typing import TYPE_CHECKING, Any

from tests.browser.desk import chromium, desk
from tests.browser.pretend import pretend_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MAX_BYTES = 100_000
ROUNDS = 5
BYTES = (
    "() => [...new Map([...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
    ".filter(({name, entryType}) => entryType === 'navigation' || new URL(name).pathname.startsWith('/page/'))"
    ".map(({name, decodedBodySize}) => [name, decodedBodySize])).values()].reduce((sum, size) => sum + size, 0)"
)
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


def figures(browser: Browser, base: str) -> dict[str, Any]:
    """Of one visit with an empty cache."""
    with desk(browser, base, is_open=False) as page:
        page.open()
        page.wait("() => document.querySelector('.stage')")
        page.wait("() => performance.getEntriesByName('first-contentful-paint').length")
        return {
            "bytes": page.page.evaluate(BYTES),
            "num_requests": len(page.requests),
            "first_paint_ms": round(page.page.evaluate(PAINT)),
            "console_errors": page.complaints,
            "foreign_requests": [one.url for one in page.requests if not one.url.startswith((base, "data:"))],
        }


def main() -> None:
    with chromium() as browser, pretend_server() as server:
        visits = [figures(browser, server.base) for _ in range(ROUNDS)]
    paints = sorted(visit["first_paint_ms"] for visit in visits)
    print(json.dumps(visits[-1] | {"first_paint_ms": median(paints), "first_paints_ms": paints}))


if __name__ == "__main__":
    main()
