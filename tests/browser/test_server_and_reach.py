"""Settings, errors, keys, the pipeline, accessibility and policy of the page. In Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from gptj_dist.errors import NotReadyError
from gptj_dist.serving.debug import DownPipeline
from gptj_dist.serving.keys import ApiKey, hash_key
from tests.browser.desk import PHONE, Desk, answer_with, desk
from tests.browser.figures import MAX_BYTES, figures
from tests.browser.pretend import PretendServer, back, pretend_server, restarting, said

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BEGIN = "The old man sat in the boat."
CARD = {"id": "demo", "object": "model", "created": 0, "owned_by": "gptj-dist", "max_model_len": 2048}
ERROR = {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": None}


class TestSettings:
    def test_a_preset_fills_in_its_fields_and_is_pressed(self, page: Desk) -> None:
        wild = page.page.get_by_role("button", name="Wild")
        wild.click()
        assert page.page.locator("[name=temperature]").input_value() == "1.2"
        assert page.page.locator("[name=min_p]").input_value() == "0.05"
        assert wild.get_attribute("aria-pressed") == "true"
        page.set(temperature=1.1)
        assert wild.get_attribute("aria-pressed") == "false"

    def test_greedy_is_a_preset(self, page: Desk) -> None:
        page.page.get_by_role("button", name="Likeliest").click()
        page.write(BEGIN)
        page.go_on(max_tokens=3)
        assert page.bodies()[0]["temperature"] == 0

    def test_settings_are_there_after_a_reload(self, page: Desk) -> None:
        page.set(max_tokens=17, seed=4)
        page.page.reload()
        page.wait("() => document.querySelector('[name=max_tokens]')?.value === '17'")
        assert page.page.locator("[name=seed]").input_value() == "4"

    def test_a_value_that_the_server_refuses_is_shown_at_its_field(self, page: Desk) -> None:
        page.write(BEGIN)
        page.set(top_p=7)
        page["go"].click()
        problem = page.page.locator("#top_p-problem")
        problem.wait_for()
        assert "top_p must be from 0 to 1" in (problem.text_content() or "")
        field = page.page.locator("[name=top_p]")
        assert field.get_attribute("aria-invalid") == "true"
        assert field.get_attribute("aria-describedby") == "top_p-problem"
        page.set(top_p=0.9)
        assert problem.count() == 0
        page.complaints.clear()

    def test_stop_texts_are_sent_line_by_line(self, page: Desk) -> None:
        page.write(BEGIN)
        page.page.locator("[name=stop]").fill("\\n\nThe End")
        page.go_on(max_tokens=3)
        assert page.bodies()[0]["stop"] == ["\n", "The End"]

    def test_checkboxes_are_fields_of_the_request(self, page: Desk) -> None:
        page.write(BEGIN)
        page.page.locator("[name=ignore_eos]").check()
        page.page.locator("[name=truncate]").check()
        page.go_on(max_tokens=3)
        assert (page.bodies()[0]["ignore_eos"], page.bodies()[0]["truncate_prompt_tokens"]) == (True, -1)

    @pytest.mark.parametrize(
        ("kind", "source", "sent"),
        [
            ("json", '{"type": "object"}', {"json": {"type": "object"}}),
            ("regex", "[a-z]+", {"regex": "[a-z]+"}),
            ("choice", "yes\nno", {"choice": ["yes", "no"]}),
        ],
    )
    def test_structured_output_is_demanded_by_what_is_pasted(
        self, page: Desk, kind: str, source: str, sent: dict[str, Any]
    ) -> None:
        page.unfold("structure")
        page.page.locator("[name=kind]").select_option(kind)
        page.page.locator("[name=structured_outputs]").fill(source)
        page.write(BEGIN)
        page.go_on(max_tokens=3)
        assert page.bodies()[0]["structured_outputs"] == sent

    @pytest.mark.parametrize("source", ["{", '{"type": "nothing"}'])
    def test_a_schema_that_cannot_be_read_is_said_at_its_field(self, page: Desk, source: str) -> None:
        page.unfold("structure")
        page.page.locator("[name=kind]").select_option("json")
        page.page.locator("[name=structured_outputs]").fill(source)
        page["go"].click()
        page.page.locator("#structured_outputs-problem").wait_for()
        page.complaints.clear()

    def test_adapters_are_sliders_and_their_strengths_are_sent(self, page: Desk) -> None:
        cards = [CARD, *(CARD | {"id": name, "parent": "demo"} for name in ("poet", "calm"))]
        answer_with(page.page, "**/v1/models", 200, {"object": "list", "data": cards})
        page.page.reload()
        page["adapterpanel"].wait_for()
        page.unfold("adapters")
        page.page.locator("#adapters [name=poet]").fill("0.5")
        page.write(BEGIN)
        page["go"].click()
        page.wait("() => document.querySelector('#problem').textContent || document.querySelector('#say').textContent")
        assert page.bodies()[0]["adapters"] == [{"name": "poet", "strength": 0.5}]
        page.complaints.clear()

    def test_a_server_without_adapters_shows_no_sliders(self, page: Desk) -> None:
        assert page["adapterpanel"].is_hidden()

    def test_chat_is_there_only_with_a_template(self, page: Desk) -> None:
        assert page["chatbox"].is_hidden()

    def test_with_a_template_the_document_can_be_a_conversation(self, page: Desk) -> None:
        answer_with(page.page, "**/tokenizer_info", 200, {"chat_template": "{{ messages }}"})
        page.page.reload()
        page["chatbox"].wait_for()
        page.page.locator("[name=chat]").press("Space")  # a click may miss it while the page is still being laid out
        page.write("Who are you?")
        page.go_on(max_tokens=4)
        page.write("And who am I?")
        page.go_on(max_tokens=4)
        said_before = said(4).strip()
        assert page.bodies("chat/completions")[1]["messages"] == [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": said_before},
            {"role": "user", "content": "And who am I?"},
        ]
        assert page.page.locator("#paper .t").count() == 8

    def test_the_request_is_shown_as_a_command(self, page: Desk) -> None:
        page.write("It's")
        page.unfold("request")
        command = page["curl"].text_content() or ""
        assert command.startswith(f"curl {page.base}/v1/completions")
        sent = command.partition("-d '")[2].removesuffix("'").replace("'\\''", "'")
        assert json.loads(sent)["prompt"] == "It's"


@pytest.fixture(scope="module")
def guarded(browser: Browser) -> Iterator[PretendServer]:
    assert browser.is_connected()
    with pretend_server(keys=(ApiKey("ann", hash_key("secret")),)) as server:
        yield server


class TestErrors:
    def test_a_key_is_asked_for_and_kept_in_the_tab(self, browser: Browser, guarded: PretendServer) -> None:
        with desk(browser, guarded.base) as page:
            page["keydialog"].wait_for()
            page["key"].fill("secret")
            page.press("Enter")
            page.wait("() => document.querySelector('#state').textContent === 'demo: ready'")
            page.write(BEGIN)
            page.go_on(max_tokens=3)
            assert page.text == BEGIN + said(3)
            kept = page.page.evaluate("() => [JSON.stringify(sessionStorage), JSON.stringify(localStorage)]")
            assert ["secret" in one for one in kept] == [True, False]
            page.page.reload()
            page.wait("() => document.querySelector('#state').textContent === 'demo: ready'")

    def test_a_wrong_key_is_asked_for_again(self, browser: Browser, guarded: PretendServer) -> None:
        with desk(browser, guarded.base) as page:
            page["keydialog"].wait_for()
            page["key"].fill("wrong")
            page.press("Enter")
            page.wait("() => document.querySelector('#state').textContent === 'needs a key'")
            page.wait("() => document.querySelector('#keydialog').open")

    def test_not_now_leaves_a_page_that_can_be_read(self, browser: Browser, guarded: PretendServer) -> None:
        with desk(browser, guarded.base) as page:
            page["keycancel"].click()
            page.write(BEGIN)
            assert page.text == BEGIN
            page["go"].click()
            page["keydialog"].wait_for()

    def test_a_busy_server_says_when_to_try_again(self, page: Desk) -> None:
        answer_with(page.page, "**/v1/completions", 429, {"error": ERROR}, {"retry-after": "7"})
        page.write(BEGIN)
        page["go"].click()
        page["problem"].wait_for()
        words = page["problem"].text_content() or ""
        assert "the queue is full" in words
        assert "Try again in 7 s" in words
        assert page["problem"].get_attribute("role") == "alert"
        page["problem"].get_by_role("button").click()
        assert page["problem"].is_hidden()
        page.complaints.clear()

    def test_a_text_that_is_too_long_says_what_to_do(self, page: Desk) -> None:
        page.write("water " * 2100)
        page["go"].click()
        page.wait("() => document.querySelector('#problem').textContent || document.querySelector('.fieldproblem')")
        words = (page["problem"].text_content() or "") + "".join(page.page.locator(".fieldproblem").all_text_contents())
        assert "2048" in words
        page.complaints.clear()

    def test_a_page_of_a_proxy_is_no_riddle(self, page: Desk) -> None:
        page.page.route("**/v1/completions", lambda route: route.fulfill(status=502, body="<html>Bad gateway"))
        page.write(BEGIN)
        page["go"].click()
        page["problem"].wait_for()
        assert "status 502" in (page["problem"].text_content() or "")
        page.complaints.clear()

    def test_while_the_model_loads_the_page_says_so_and_notices_the_end(
        self, browser: Browser, server: PretendServer
    ) -> None:
        server.pipelines.unready = NotReadyError("the model is still loading")
        with desk(browser, server.base) as page:
            page.wait("() => document.querySelector('#state').textContent.includes('still loading')")
            server.pipelines.unready = None
            page.wait("() => document.querySelector('#state').textContent === 'demo: ready'")


class TestPipeline:
    def test_stages_have_layers_a_device_memory_and_what_they_do(self, page: Desk) -> None:
        stages = page.page.locator(".stage")
        stages.nth(1).wait_for()
        words = stages.nth(0).text_content() or ""
        for part in ("Stage 0", "layers 0\u201313", "cpu", "float32", "81 %", "180 MB of 1.9 GB", "6.0 GB of weights"):
            assert part in words
        assert "layers 14\u201327" in (stages.nth(1).text_content() or "")

    def test_the_pipeline_has_its_rate_its_requests_and_its_micro_batches(self, page: Desk) -> None:
        page.page.locator(".rates").wait_for()
        words = page.page.locator(".rates").text_content() or ""
        for part in (
            "48 tokens/s",
            "2 running, 0 waiting",
            "3 micro-batches in flight",
            "KV 9 % in use",
            "41 of 60 guessed tokens accepted",
        ):
            assert part in words
        assert page.page.locator(".dots i").count() in (2, 3)

    def test_a_stage_that_dies_and_returns_is_seen_and_said(self, page: Desk, server: PretendServer) -> None:
        page.page.locator(".stage").nth(1).wait_for()
        server.pipelines.documents_now = (restarting(),)
        page.page.locator(".lost").wait_for()
        assert "killed by SIGKILL" in (page.page.locator(".lost").text_content() or "")
        page.wait("() => document.querySelector('#say').textContent.includes('stage was lost')")
        assert "Stage 1" in (page.page.locator(".stage.dead .name").text_content() or "")
        server.pipelines.documents_now = (back(),)
        page.wait("() => document.querySelector('#say').textContent.includes('up again')")
        assert page.page.locator(".stage.dead").count() == 0
        assert "was back after 3.2 s" in (page["pipeline"].text_content() or "")

    def test_a_pipeline_that_is_down_is_shown_with_the_reason(self, page: Desk, server: PretendServer) -> None:
        server.pipelines.documents_now = ()
        server.pipelines.down = (DownPipeline("Pipeline#1", "its coordinator died", 4.2, "2026-01-01"),)
        page.page.locator(".lost").wait_for()
        assert "its coordinator died" in (page.page.locator(".lost").text_content() or "")

    def test_a_continuation_has_its_times_and_cached_and_drafted_tokens(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=9)
        words = page["took"].text_content() or ""
        for part in ("First token", " ms", "Rate", "9 tokens", "Cached", "16 tokens", "Prompt", "3 of 9 tokens"):
            assert part in words


class TestAccessibility:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", ["desk", "phone"])
    def test_axe_finds_nothing(self, browser: Browser, server: PretendServer, scheme: str, width: str) -> None:
        from axe_playwright_python.sync_playwright import Axe

        size: dict[str, Any] = {"viewport": PHONE} if width == "phone" else {}
        with desk(browser, server.base, color_scheme=scheme, **size) as page:
            page.write(BEGIN)
            page.go_on(n=2, max_tokens=8)
            page.press("Alt+1")
            page["heat"].select_option("probability")
            for panel in ("pipeline", "sampling", "tree", "structure", "files", "request"):
                page.unfold(panel)
            page["text"].focus()
            page.press("Alt+ArrowDown")
            page["popover"].wait_for()
            results = Axe().run(page.page)
            assert results.violations_count == 0, results.generate_report()

    def test_axe_finds_nothing_in_the_dialog_of_the_key(self, browser: Browser, guarded: PretendServer) -> None:
        from axe_playwright_python.sync_playwright import Axe

        with desk(browser, guarded.base) as page:
            page["keydialog"].wait_for()
            results = Axe().run(page.page)
            assert results.violations_count == 0, results.generate_report()

    def test_every_control_is_reached_by_tab_and_shows_its_focus(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=3)
        seen: list[str] = []
        for _ in range(60):
            page.press("Tab")
            name, outline = page.page.evaluate(
                "() => [document.activeElement.id || document.activeElement.name || document.activeElement.tagName,"
                " getComputedStyle(document.activeElement).outlineStyle]"
            )
            assert outline != "none" or name in ("BODY", "text"), name
            seen.append(name)
        assert {"go", "again", "undo", "heat", "max_tokens", "n", "stop", "mark", "documents", "new"} <= set(seen)

    def test_a_screen_reader_hears_the_begin_and_the_end_not_each_token(self, page: Desk) -> None:
        page["say"].evaluate(
            "one => { window.heard = []; new MutationObserver(() => window.heard.push(one.textContent))"
            ".observe(one, {childList: true}); }"
        )
        page.write(BEGIN)
        page.set(max_tokens=50)
        page.press("Control+Enter")
        page.settle()
        assert page.page.evaluate("() => window.heard") == ["Writing.", "Done: 50 tokens."]
        assert page["paper"].get_attribute("aria-hidden") == "true"

    def test_a_phone_scrolls_in_one_direction_only(self, browser: Browser, server: PretendServer) -> None:
        with desk(browser, server.base, viewport={"width": 320, "height": 600}) as page:
            page.write(BEGIN)
            page.go_on(max_tokens=60)
            for panel in ("pipeline", "sampling", "tree", "structure", "files", "request"):
                page.unfold(panel)
            assert page.page.evaluate("() => document.documentElement.scrollWidth") <= 320

    def test_who_wants_less_motion_sees_none(self, browser: Browser, server: PretendServer) -> None:
        with desk(browser, server.base, reduced_motion="reduce") as page:
            page.page.locator(".dots i").first.wait_for(state="attached")
            assert page.page.evaluate("() => document.getAnimations().length") == 0

    def test_without_script_the_page_says_so(self, browser: Browser, server: PretendServer) -> None:
        with desk(browser, server.base, is_open=False, java_script_enabled=False) as page:
            page.page.goto(server.base)
            assert "needs JavaScript" in page.page.inner_text("noscript")


class TestWeight:
    def test_it_is_small_and_asks_for_nothing_elsewhere(self, browser: Browser, server: PretendServer) -> None:
        found = figures(browser, server.base)
        assert found["bytes"] <= MAX_BYTES
        assert found["foreign_requests"] == []
        assert found["console_errors"] == []
        assert found["num_requests"] <= 20

    def test_its_policy_stops_scripts_that_are_not_its_own(self, page: Desk) -> None:
        violated = page.page.evaluate(
            "() => new Promise((resolve) => { document.addEventListener('securitypolicyviolation',"
            " (event) => resolve(event.violatedDirective)); const one = document.createElement('script');"
            " one.textContent = '1'; document.body.append(one); })"
        )
        assert violated.startswith("script-src")
        page.complaints.clear()
