"""The page at a real server with two stages: what it writes, stops, branches, and a stage that is killed meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.desk import Desk, chromium, desk, require_chromium
from tests.http.server import Server, serving
from tests.waiting import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.ray

BEGIN = "Fellow citizens, the state of the Union is"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    require_chromium()
    with serving({"model": "demo", "stages": 2, "device": "cpu", "dtype": "float32"}) as server:
        yield server


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Browser]:
    assert server.is_ready()  # it starts before Chromium, which gives the thread an event loop
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Desk]:
    with desk(browser, server.base) as page:
        page.wait("() => document.querySelector('#state').textContent.endsWith('ready')")
        yield page
        assert page.complaints == []


def pipeline(server: Server) -> dict[str, Any]:
    document: dict[str, Any] = server.client.get("/debug/pipeline").json()["pipelines"][0]
    return document


def test_the_page_writes_what_the_model_writes_with_its_probabilities(page: Desk, server: Server) -> None:
    expected = server.complete(prompt=BEGIN, max_tokens=24, temperature=0, logprobs=10)["choices"][0]
    page.write(BEGIN)
    page.go_on(max_tokens=24, temperature=0, top_p=1)
    assert page.text == BEGIN + expected["text"]
    page.caret(len(BEGIN), len(page.text))
    total = sum(expected["logprobs"]["token_logprobs"])
    assert f"log probability {total:.2f}" in (page["about"].text_content() or "")


def test_the_stages_are_those_of_the_server(page: Desk, server: Server) -> None:
    stages = page.page.locator(".stage")
    stages.nth(1).wait_for()
    for number, stage in enumerate(pipeline(server)["stages"]):
        words = stages.nth(number).text_content() or ""
        assert f"layers {stage['layers'][0]}" in words or f"layer {stage['layers'][0]}" in words
        assert stage["device"] in words


def test_what_is_typed_is_scored_by_the_model(page: Desk, server: Server) -> None:
    asked = {"prompt": BEGIN, "max_tokens": 0, "echo": True, "logprobs": 0}
    scores = server.complete(**asked)["choices"][0]["logprobs"]["token_logprobs"]
    page.write(BEGIN)
    page["heat"].select_option("probability")
    page["score"].click()
    page.wait("() => document.querySelector('#paper .t')")
    page.caret(0, len(BEGIN))
    assert f"log probability {sum(scores[1:]):.2f}" in (page["about"].text_content() or "")


def test_escape_ends_the_computation(page: Desk, server: Server) -> None:
    page.write(BEGIN)
    page.set(max_tokens=900)
    page.page.locator("[name=ignore_eos]").check()
    page["go"].click()
    page.wait("length => document.querySelector('#text').value.length > length", len(BEGIN) + 20)
    page.press("Escape")
    page.settle("Stopped")
    wait_until(lambda: pipeline(server)["num_used_blocks"] == 0, "no KV block is in use", 20)
    assert len(page.text) > len(BEGIN) + 20


def test_another_token_is_chosen_and_the_text_goes_on_from_there(page: Desk) -> None:
    page.write(BEGIN)
    page.go_on(max_tokens=8, temperature=0, top_p=1)
    old = page.text
    page.caret(len(BEGIN) + 1)
    page.press("Alt+ArrowDown")
    page["popover"].wait_for()
    page.hush()
    page.page.locator("#popover button:enabled:not([aria-current])").first.click()
    page.settle()
    assert page.text != old
    assert page.text.startswith(BEGIN)
    page.press("Alt+ArrowLeft")
    assert page.text == old


def test_n_continuations_are_computed_at_once(page: Desk) -> None:
    page.write(BEGIN)
    page.go_on(n=4, max_tokens=10)
    assert len(set(page.page.locator(".choice span").all_text_contents())) > 1
    page.press("Alt+4")
    assert page["forkplace"].text_content() == "4 of 4"


def test_a_stage_that_is_killed_is_seen_and_the_text_is_the_one_that_it_would_have_been(
    page: Desk, server: Server
) -> None:
    asked = {"max_tokens": 600, "temperature": 0.9, "seed": 11, "ignore_eos": True}
    expected = server.complete(prompt=BEGIN, **asked)["choices"][0]["text"]
    page.write(BEGIN)
    page.set(max_tokens=600, temperature=0.9, top_p=1, seed=11)
    page.page.locator("[name=ignore_eos]").check()
    page["go"].click()
    page.wait("length => document.querySelector('#text').value.length > length", len(BEGIN) + 40)
    os.kill(pipeline(server)["stages"][1]["pid"], signal.SIGKILL)
    page.page.locator(".lost").wait_for()
    page.settle()
    assert page.text == BEGIN + expected
    page.wait("() => /Restarts: [1-9]/.test(document.querySelector('#pipeline').textContent)")
