"""Writing on the page: continuing, stopping, trying again, moves, continuations side by side. In Chromium."""

from __future__ import annotations

import pytest

from gptj_dist.errors import StageFailedError
from tests.browser.desk import Desk
from tests.browser.pretend import TEXT, PretendServer, said
from tests.waiting import wait_until

BEGIN = "The old man sat in the boat."


class TestWriting:
    def test_a_new_page_has_the_caret_in_an_empty_document(self, page: Desk) -> None:
        assert page.text == ""
        assert page["text"].evaluate("one => one === document.activeElement")

    def test_what_is_typed_is_shown_as_the_users(self, page: Desk) -> None:
        page.page.keyboard.type("Call me")
        assert page["paper"].text_content() == "Call me\u200b"
        assert page.models_words == ""

    def test_ctrl_enter_continues_and_the_models_words_are_shown_as_such(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=12)
        assert page.text == BEGIN + said(12)
        assert page.models_words == said(12)

    def test_the_button_continues(self, page: Desk) -> None:
        page.write(BEGIN)
        page["go"].click()
        page.settle()
        assert page.text.startswith(BEGIN + said(3))

    def test_the_request_is_one_of_the_public_api(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=5, temperature=0.5, seed=7)
        (body,) = page.bodies()
        assert body["prompt"] == BEGIN
        assert (body["max_tokens"], body["temperature"], body["seed"]) == (5, 0.5, 7)
        assert body["model"] == "demo"
        assert body["stream"] is True
        assert body["logprobs"] == 10
        assert "top_k" not in body  # it would change nothing

    def test_an_empty_document_is_continued_too(self, page: Desk) -> None:
        page.go_on(max_tokens=4)
        assert page.text == said(4)

    def test_text_streams_before_the_end(self, page: Desk, server: PretendServer) -> None:
        server.story.pace_s = 0.05
        page.write(BEGIN)
        page.set(max_tokens=400)
        page["text"].focus()
        page.press("Control+Enter")
        page.wait("length => document.querySelector('#text').value.length > length", len(BEGIN) + 10)
        assert page["stop"].is_visible()
        page.press("Escape")
        page.settle("Stopped")

    def test_the_document_is_not_typed_in_while_the_model_writes(self, page: Desk, server: PretendServer) -> None:
        server.story.pace_s = 0.05
        page.write(BEGIN)
        page.set(max_tokens=200)
        page["go"].click()
        page.wait("() => document.querySelector('#text').readOnly")
        assert page["text"].get_attribute("aria-busy") == "true"
        page["stop"].click()
        page.settle("Stopped")
        assert page["text"].get_attribute("aria-busy") == "false"

    @pytest.mark.parametrize("way", ["key", "button"])
    def test_stopping_keeps_what_has_come_and_ends_the_request(
        self, page: Desk, server: PretendServer, way: str
    ) -> None:
        server.story.pace_s = 0.03
        page.begin_to_go_on(BEGIN)
        if way == "key":
            page.press("Escape")
        else:
            page["stop"].click()
        page.settle("Stopped")
        wait_until(lambda: server.story.num_open == 0, "the stream is closed", 10)
        assert (BEGIN + TEXT).startswith(page.text)

    def test_characters_of_many_bytes_keep_tokens_in_place(self, page: Desk) -> None:
        page.write("🐟🐟 naïve „Ω“ 🐠")
        page["heat"].select_option("probability")
        page["score"].click()
        page.wait("() => document.querySelector('#paper .t')")
        page.go_on(max_tokens=6)
        assert page["paper"].text_content() == "🐟🐟 naïve „Ω“ 🐠" + said(6) + "\u200b"

    def test_lines_of_the_paper_and_of_the_textarea_are_the_same(self, page: Desk) -> None:
        page.write(BEGIN + "\n\n" + "word " * 80 + "\n")
        page.go_on(max_tokens=60)
        sizes = page.page.evaluate(
            "() => [document.querySelector('#text').scrollHeight, document.querySelector('#paper').offsetHeight]"
        )
        assert sizes[0] <= sizes[1]


class TestMoves:
    def test_ctrl_r_tries_again_from_the_same_place(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=5)
        page.again()
        assert [body["prompt"] for body in page.bodies()] == [BEGIN, BEGIN]
        assert page.text == BEGIN + said(5)
        assert page["forkplace"].text_content() == "2 of 2"

    def test_undo_takes_a_continuation_back_and_redo_brings_it_again(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=5)
        page.press("Control+z")
        assert page.text == BEGIN
        page.press("Control+y")
        assert page.text == BEGIN + said(5)
        assert page.models_words == said(5)

    def test_ctrl_shift_z_is_redo_too(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=5)
        page.press("Control+z", "Control+Shift+Z")
        assert page.text == BEGIN + said(5)

    def test_undo_goes_back_to_the_empty_document(self, page: Desk) -> None:
        page.write(BEGIN)
        page.press("Control+z")
        assert page.text == ""
        assert page["undo"].is_disabled()

    def test_undo_in_a_setting_is_the_browsers(self, page: Desk) -> None:
        page.write(BEGIN)
        page.page.locator("#sampling [name=stop]").focus()
        page.press("Control+z")
        assert page.text == BEGIN

    def test_a_change_in_the_middle_keeps_the_rest_as_the_models_words(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=8)
        page.caret(4)
        page.page.keyboard.insert_text("very ")
        assert page.text == BEGIN.replace("old", "very old") + said(8)
        assert page.models_words == said(8)

    def test_a_change_leaves_the_old_text_in_the_tree(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=8)
        page.caret(4, 8)
        page.press("Delete")
        assert page.text == BEGIN.replace("old ", "") + said(8)
        page.press("Control+z")
        assert page.text == BEGIN + said(8)
        assert page.page.locator("#paper .t").count() == 8  # tokens with their scores

    def test_arrows_with_alt_turn_through_branches(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(max_tokens=5)
        page.press("Control+z")
        page.write(" Then")
        page.press("Alt+ArrowLeft")
        assert page.text == BEGIN + said(5)
        page.press("Alt+ArrowRight")
        assert page.text == BEGIN + " Then"

    def test_ctrl_shift_enter_continues_at_the_caret_and_keeps_the_rest_in_the_tree(self, page: Desk) -> None:
        page.write(BEGIN)
        page.caret(11)
        page.hush()
        page.set(max_tokens=4)
        page["text"].focus()
        page.press("Control+Shift+Enter")
        page.settle()
        assert page.bodies()[0]["prompt"] == BEGIN[:11]
        assert page.text == BEGIN[:11] + said(4)
        page.press("Alt+ArrowLeft")
        assert page.text == BEGIN


class TestSideBySide:
    def test_n_continuations_come_from_one_request(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(n=3, max_tokens=6)
        (body,) = page.bodies()
        assert body["n"] == 3
        assert page.page.locator(".choice span").all_text_contents() == [said(6, number) for number in range(3)]
        assert page.text == BEGIN

    @pytest.mark.parametrize("way", ["click", "key"])
    def test_one_is_picked(self, page: Desk, way: str) -> None:
        page.write(BEGIN)
        page.go_on(n=3, max_tokens=6)
        if way == "click":
            page.page.locator(".choice").nth(1).click()
        else:
            page.press("Alt+2")
        assert page.text == BEGIN + said(6, 1)
        assert page["choices"].is_hidden()

    def test_those_that_were_not_picked_stay_in_the_tree(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(n=3, max_tokens=6)
        page.press("Alt+3")
        assert page["forkplace"].text_content() == "3 of 3"
        page["earlier"].click()
        assert page.text == BEGIN + said(6, 1)

    def test_trying_again_asks_for_as_many(self, page: Desk) -> None:
        page.write(BEGIN)
        page.go_on(n=2, max_tokens=6)
        page.again()
        assert [body["prompt"] for body in page.bodies()] == [BEGIN, BEGIN]
        assert page.page.locator(".choice").count() == 2


class TestBrokenStreams:
    def test_an_error_in_the_middle_keeps_the_text_and_says_what_to_do(self, page: Desk, server: PretendServer) -> None:
        server.story.fails_after = (5, StageFailedError("stage 1 was lost 5 times"))
        page.write(BEGIN)
        page.set(max_tokens=20)
        page["go"].click()
        page.settle("Broken off")
        assert page.text == BEGIN + said(5)
        problem = page["problem"].text_content() or ""
        assert "stage 1 was lost 5 times" in problem
        assert "Continue goes on from there" in problem
        server.story.fails_after = None
        page.go_on(max_tokens=3)
        assert page["problem"].is_hidden()

    def test_a_server_that_is_gone_is_said_so(self, page: Desk) -> None:
        page.page.route("**/v1/completions", lambda route: route.abort())
        page.write(BEGIN)
        page["go"].click()
        page["problem"].wait_for()
        assert "cannot be reached" in (page["problem"].text_content() or "")
        assert page.text == BEGIN
        page.complaints.clear()  # the browser's own words about it
