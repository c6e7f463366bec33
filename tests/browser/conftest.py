"""One Chromium and one server for the tests of a module; each test has a page of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser.desk import Desk, chromium, desk
from tests.browser.pretend import PretendServer, pretend_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def running(browser: Browser) -> Iterator[PretendServer]:
    assert browser.is_connected()
    with pretend_server() as server:
        yield server


@pytest.fixture
def server(running: PretendServer) -> PretendServer:
    running.reset()
    return running


@pytest.fixture
def page(browser: Browser, server: PretendServer) -> Iterator[Desk]:
    """The page. The test fails if a script or the console complains; one that makes errors clears `complaints`."""
    with desk(browser, server.base) as page:
        yield page
        assert page.complaints == []
