"""`gptj-dist key`, and the page that tells of keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from examples.moderation import moderate
from gptj_dist.cli import app
from gptj_dist.errors import ConfigurationError
from gptj_dist.serving.keys import find_key, read_keys

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def test_a_key_that_was_made_opens_what_its_entry_says(tmp_path: Path) -> None:
    options = ["--name", "alice", "--requests-per-minute", "3"]
    key, entry = CliRunner().invoke(app, ["key", *options]).output.split("\n\n")
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": yaml.safe_load(entry)}))
    keys = read_keys(path)
    found = find_key(keys, key)
    assert found is not None
    assert (found.name, found.requests_per_minute, found.tokens_per_minute) == ("alice", 3, None)
    assert find_key(keys, key[:-1]) is None


def test_two_keys_are_two() -> None:
    one, other = (CliRunner().invoke(app, ["key"]).output for _ in range(2))
    assert one != other
    assert len(one.strip()) > 40


def test_limits_without_a_name_are_refused() -> None:
    result = CliRunner().invoke(app, ["key", "--tokens-per-minute", "5"])
    assert isinstance(result.exception, ConfigurationError)
    assert "gptj-" not in result.output


def test_the_file_of_the_page_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "keys.yaml"
    path.write_text(example)
    assert [key.name for key in read_keys(path)] == ["alice", "batch jobs"]


@pytest.mark.parametrize(("text", "passes"), [("The weather is fine.", True), ("My PASSWORD is", False)])
def test_the_example_of_a_moderator_refuses_what_it_says(text: str, passes: bool) -> None:
    assert (moderate(text, "prompt") is None) == passes
