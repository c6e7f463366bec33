"""The join code: what it holds, and which mistakes it finds."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptj_dist.cli import app
from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.cluster.code import JoinCode, Place

ROOT = Path(__file__).parents[2]
CODE = JoinCode(0x0123456789ABCDEF, Place("10.0.0.7", 6379))


def test_a_code_gives_back_what_it_was_made_of() -> None:
    assert JoinCode.parse(str(CODE)) == CODE
    assert JoinCode.parse(str(CODE.without_place)) == JoinCode(CODE.secret, None)
    assert (len(str(CODE)), len(str(CODE.without_place))) == (29, 17)


def test_case_spaces_hyphens_and_lookalikes_do_not_matter() -> None:
    typed = str(CODE).lower().replace("-", " ").replace("0", "o").replace("1", "l")
    assert JoinCode.parse(typed) == CODE


@pytest.mark.parametrize("text", [str(CODE), str(CODE.without_place)])
def test_every_mistyped_character_and_every_swap_of_neighbours_is_found(text: str) -> None:
    letters = text.replace("-", "")
    wrong = {
        letters[:i] + c + letters[i + 1 :]
        for i in range(len(letters))
        for c in string.digits + "ABCDEFGHJKMNPQRSTVWXYZ"
    }
    wrong |= {letters[:i] + letters[i + 1] + letters[i] + letters[i + 2 :] for i in range(len(letters) - 1)}
    assert len(wrong - {letters}) > 450
    for mistyped in wrong - {letters}:
        with pytest.raises(ConfigurationError, match="typing error"):
            JoinCode.parse(mistyped)


@pytest.mark.parametrize(
    ("text", "told"), [("", "25 letters"), (str(CODE)[:-1], "this has 24"), ("?" + str(CODE)[1:], "has no '[?]'")]
)
def test_a_code_that_is_none_is_refused_in_a_line(text: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        JoinCode.parse(text)


def test_two_codes_of_one_place_have_secrets_tokens_and_keys_of_their_own() -> None:
    one, other = JoinCode.new(Place("10.0.0.7", 6379)), JoinCode.new(Place("10.0.0.7", 6379))
    assert one.secret != other.secret
    assert one.ray_token != other.ray_token
    assert one.ray_token != one.probe_key.hex()
    assert JoinCode.parse(str(one)).ray_token == one.ray_token == one.without_place.ray_token


def test_every_printed_code_is_one() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "gptj_dist/cli/examples.py"]
    groups = re.compile(r"\b[0-9A-Z]{5}(?:-[0-9A-Z]{5}){2,4}\b")
    codes = {code for page in pages for code in groups.findall(page.read_text())}
    assert {JoinCode.parse(code).place is None for code in codes} == {True, False}


def test_a_code_comes_from_the_environment_too() -> None:
    done = CliRunner().invoke(app, ["join"], env={"GPTJ_DIST_JOIN_CODE": str(CODE.without_place)})
    assert isinstance(done.exception, ConfigurationError)
    assert "no address" in str(done.exception)
