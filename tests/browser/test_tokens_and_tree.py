"""What the page shows of tokens, and its tree of continuations, documents and files. In Chromium."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.desk import PHONE, Desk, desk
from tests.browser.pretend import SHARES, PretendServer, said

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BEGIN = "The old man sat in the boat."


@pytest.fixture
def written(page: Desk) -> Desk:
    """A page with a continuation of 12 tokens."""
    page.write(BEGIN)
    page.go_on(max_tokens=12)
    return page


def heats(page: Desk) -> list[str]:
    """The levels of all tokens, such as `h2`."""
    classes: list[str] = page.page.locator("#paper .t").evaluate_all("all => all.map((one) => one.className)")
    return [name.rpartition(" ")[2] for name in classes]


class TestTokens:
    def test_heat_shows_how_probable_each_token_was(self, written: Desk) -> None:
        written["heat"].select_option("probability")
        levels = heats(written)
        assert levels[SHARES.index(0.9)] == "h0"
        assert levels[SHARES.index(0.007)] in ("h4", "h5")
        assert len(levels) == 12

    @pytest.mark.parametrize("kind", ["entropy", "rank"])
    def test_heat_by_entropy_and_rank_is_another_one(self, written: Desk, kind: str) -> None:
        written["heat"].select_option("probability")
        by_probability = heats(written)
        written["heat"].select_option(kind)
        assert heats(written) != by_probability
        assert all(level.startswith("h") for level in heats(written))

    def test_the_likeliest_token_has_rank_1_and_no_heat(self, written: Desk) -> None:
        written["heat"].select_option("rank")
        assert heats(written)[SHARES.index(0.9)] == "h0"

    def test_what_the_user_wrote_is_scored_by_echo(self, page: Desk) -> None:
        page.write(BEGIN)
        page["heat"].select_option("probability")
        page["score"].click()
        page.wait("() => document.querySelector('#paper .t')")
        (body,) = page.bodies()
        assert (body["prompt"], body["echo"], body["max_tokens"], body["logprobs"]) == (BEGIN, True, 0, 10)
        assert page.models_words == ""
        assert len([level for level in heats(page) if level.startswith("h")]) >= 5
        assert page["score"].is_hidden()

    def test_the_caret_tells_of_its_token(self, written: Desk) -> None:
        written.caret(len(written.text))
        about = written["about"].text_content() or ""
        assert "rank" in about
        assert "entropy at least" in about
        assert "bits" in about

    def test_hovering_shows_the_ten_likeliest(self, written: Desk) -> None:
        box = written.page.locator("#paper .t").nth(2).bounding_box()
        assert box is not None
        written.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        written["popover"].wait_for()
        shares = [
            float(text.removeprefix("< ").rstrip(" %"))
            for text in written.page.locator("#popover .share").all_text_contents()
        ]
        assert len(shares) == 10
        assert shares == sorted(shares, reverse=True)
        written.page.mouse.move(5, 5)
        written["popover"].wait_for(state="hidden")

    def test_by_keyboard_the_likeliest_open_at_the_caret_and_escape_returns(self, written: Desk) -> None:
        written.press("Alt+ArrowDown")
        written["popover"].wait_for()
        focused = "() => document.activeElement.closest('#popover') ? document.activeElement.ariaLabel : null"
        first = written.page.evaluate(focused)
        written.press("ArrowDown")
        assert first
        assert written.page.evaluate(focused) != first
        written.press("Escape")
        assert written["popover"].is_hidden()
        assert written["text"].evaluate("one => one === document.activeElement")

    def test_choosing_another_token_goes_on_from_there_and_keeps_the_old_branch(self, written: Desk) -> None:
        old = written.text
        written.caret(len(BEGIN) + len(said(3)))
        written["likeliest"].click()
        other = written.page.locator("#popover button:not([aria-current])").first
        word = other.locator(".what").text_content() or ""
        written.hush()
        other.click()
        written.settle()
        kept = BEGIN + said(2) + word.replace("␣", " ")
        assert written.bodies()[-1]["prompt"] == kept
        assert written.text.startswith(kept)
        assert len(written.text) > len(kept)
        written.press("Alt+ArrowLeft")
        assert written.text == old

    def test_a_selection_has_the_sum_of_its_log_probabilities(self, written: Desk) -> None:
        written.caret(len(BEGIN), len(BEGIN) + len(said(4)))
        about = written["about"].text_content() or ""
        assert f"4 tokens, log probability {sum(map(log, SHARES[:4])):.2f}" in about

    def test_a_selection_without_scores_says_so(self, written: Desk) -> None:
        written.caret(0, len(BEGIN))
        assert "none has a log probability yet" in (written["about"].text_content() or "")

    def test_on_a_phone_the_likeliest_open_by_a_button_and_stay_in_sight(
        self, browser: Browser, server: PretendServer
    ) -> None:
        with desk(browser, server.base, viewport=PHONE) as phone:
            phone.write(BEGIN)
            phone["go"].click()
            phone.settle()
            phone["likeliest"].click()
            box = phone["popover"].bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= PHONE["width"]


def branches(page: Desk) -> list[str]:
    return page.page.locator("#tree [role=treeitem]").all_text_contents()


class TestTree:
    def test_every_continuation_is_a_branch(self, written: Desk) -> None:
        written.again()
        assert len(branches(written)) == 3  # what they share, and both
        assert branches(written)[0] == BEGIN

    def test_a_click_goes_to_a_branch(self, written: Desk) -> None:
        old = written.text
        written.press("Control+z")
        written.write(" And then")
        items = written.page.locator("#tree [role=treeitem]")
        items.filter(has_text=said(12).strip()[:20]).click()
        assert written.text == old

    def test_arrows_and_enter_go_to_a_branch(self, written: Desk) -> None:
        old = written.text
        written.press("Control+z")
        written.write(" And then")
        written.page.locator("#tree [tabindex='0']").focus()
        written.press("ArrowUp", "Enter")
        assert written.text == old

    def test_bookmarks_are_marked_and_can_be_shown_alone(self, written: Desk) -> None:
        written["mark"].click()
        written.page.locator("#label").fill("the good one")
        written.page.locator("#label").press("Tab")
        written.press("Control+z")
        written.write(" And then")
        written["marked"].check()
        (only,) = branches(written)
        assert only.startswith("★ the good one")
        written.page.locator("#tree [role=treeitem]").click()
        assert written["mark"].text_content() == "Remove bookmark"

    def test_a_branch_is_deleted(self, written: Desk) -> None:
        written["prune"].click()
        assert written.text == BEGIN
        assert branches(written) == [BEGIN]

    def test_several_children_grow_from_any_node(self, written: Desk) -> None:
        written.press("Control+z")
        written.go_on(n=2, max_tokens=3)
        assert len(branches(written)) == 4

    def test_the_tree_says_its_levels_and_what_is_selected(self, written: Desk) -> None:
        written.press("Control+z")
        written.write(" And then")
        items = written.page.locator("#tree [role=treeitem]")
        assert [items.nth(at).get_attribute("aria-level") for at in range(3)] == ["1", "2", "2"]
        assert [items.nth(at).get_attribute("aria-selected") for at in range(3)] == ["false", "false", "true"]


class TestDocuments:
    def test_a_document_is_there_after_a_reload_at_once_with_its_tree_and_scores(self, written: Desk) -> None:
        old = written.text
        written.page.reload()
        written.wait("() => document.querySelector('#text').value.length > 0")
        assert written.text == old
        assert written.models_words == said(12)
        assert written.page.locator("#paper .t").count() == 12
        written.press("Control+z")
        assert written.text == BEGIN

    def test_a_new_document_is_empty_and_the_old_one_can_be_chosen(self, written: Desk) -> None:
        old = written.text
        written["new"].click()
        written.wait("() => document.querySelector('#text').value === ''")
        written.write("Another one")
        written.wait("() => document.querySelectorAll('#documents option').length === 2")
        written["documents"].select_option(index=1)
        written.wait("text => document.querySelector('#text').value === text", old)

    def test_another_document_stops_the_writing_and_keeps_what_has_come(
        self, page: Desk, server: PretendServer
    ) -> None:
        server.story.pace_s = 0.03
        page.begin_to_go_on(BEGIN)
        page["new"].click()
        page.wait("() => document.querySelector('#text').value === ''")
        page["documents"].select_option(index=1)
        page.wait("length => document.querySelector('#text').value.length > length", len(BEGIN) + 10)
        assert page.models_words == page.text.removeprefix(BEGIN)

    def test_a_browser_that_keeps_nothing_has_the_page_all_the_same(
        self, browser: Browser, server: PretendServer
    ) -> None:
        with desk(browser, server.base, is_open=False) as page:
            page.page.add_init_script(
                "for (const name of ['localStorage', 'sessionStorage', 'indexedDB'])"
                " Object.defineProperty(window, name, {get() { throw new DOMException('denied', 'SecurityError'); }})"
            )
            page.open()
            page.write(BEGIN)
            page.go_on(max_tokens=3)
            assert page.text == BEGIN + said(3)
            page.unfold("files")
            page.wait("() => document.querySelector('#filenote').textContent.includes('keeps no documents')")

    def test_exported_json_comes_back_as_the_same_tree(self, written: Desk, tmp_path: Path) -> None:
        written.unfold("files")
        with written.page.expect_download() as download:
            written["savejson"].click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        old, tree = written.text, branches(written)
        written["new"].click()
        written.wait("() => document.querySelector('#text').value === ''")
        written["file"].set_input_files(path)
        written.wait("text => document.querySelector('#text').value === text", old)
        assert branches(written) == tree
        assert written.page.locator("#paper .t").count() == 12
        assert json.loads(path.read_text())["format"] == "gptj-dist tree 1"

    def test_exported_text_is_the_document(self, written: Desk, tmp_path: Path) -> None:
        written.unfold("files")
        with written.page.expect_download() as download:
            written["savetext"].click()
        download.value.save_as(tmp_path / "text")
        assert (tmp_path / "text").read_text() == written.text
        assert download.value.suggested_filename.endswith(".txt")

    def test_a_text_file_becomes_a_document(self, page: Desk, tmp_path: Path) -> None:
        (tmp_path / "moby.txt").write_text("Call me Ishmael.\n")
        page["file"].set_input_files(tmp_path / "moby.txt")
        page.wait("() => document.querySelector('#text').value === 'Call me Ishmael.\\n'")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "not JSON"),
            ("[]", "its format is not"),
            ('{"format": "gptj-dist tree 1", "nodes": []}', "no root"),
            (
                '{"format": "gptj-dist tree 1", "nodes": [{"id": 0, "parent": null, "text": "", "by": "user"},'
                ' {"id": 1, "parent": 7, "text": "a", "by": "user"}]}',
                "do not hang on the root",
            ),
        ],
    )
    def test_a_broken_file_is_refused_with_the_reason(
        self, page: Desk, tmp_path: Path, content: str, words: str
    ) -> None:
        page.write(BEGIN)
        (tmp_path / "bad.json").write_text(content)
        page["file"].set_input_files(tmp_path / "bad.json")
        page.wait("() => document.querySelector('#filenote').textContent.startsWith('Not imported')")
        assert words in (page["filenote"].text_content() or "")
        assert page.text == BEGIN

    def test_a_document_is_deleted_after_a_question(self, written: Desk) -> None:
        written.unfold("files")
        written.page.on("dialog", lambda dialog: dialog.accept())
        written["drop"].click()
        written.wait("() => document.querySelector('#text').value === ''")
