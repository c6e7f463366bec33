"""API keys: which open, what a file of them may say, and what each has left, to the second."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.requests import Request

from gptj_dist.errors import ConfigurationError, NotPermittedError
from gptj_dist.serving.http.endpoints import require_admin
from gptj_dist.serving.keys import ApiKey, Quotas, find_key, hash_key, read_keys

ANN = ApiKey("ann", hash_key("one"), requests_per_minute=2, tokens_per_minute=100)
BOB = ApiKey("bob", hash_key("two"), tokens_per_minute=60)
EVE = ApiKey("eve", hash_key("three"), requests_per_minute=6)
ENTRY = {"name": "ann", "sha256": hash_key("one")}


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas([ANN, BOB, EVE], clock)


def test_requests_come_back_one_by_one(quotas: Quotas, clock: Clock) -> None:
    assert [quotas.charge("ann", 1) for _ in range(3)] == [0, 0, 30]
    clock.now_s += 12
    assert quotas.charge("ann", 1) == pytest.approx(18)
    clock.now_s += 18
    assert [quotas.charge("ann", 1) for _ in range(2)] == [0, pytest.approx(30)]


def test_tokens_come_back_by_the_second(quotas: Quotas, clock: Clock) -> None:
    assert quotas.charge("bob", 40) == 0
    assert quotas.charge("bob", 50) == pytest.approx(30)
    clock.now_s += 29
    assert quotas.charge("bob", 50) == pytest.approx(1)
    assert quotas.charge("bob", 49) == 0


def test_the_longer_wait_counts(quotas: Quotas) -> None:
    assert quotas.charge("ann", 95) == 0
    assert quotas.charge("ann", 20) == pytest.approx(15 / 100 * 60)  # a request is left, tokens are not
    assert quotas.charge("ann", 5) == 0
    assert quotas.charge("ann", 20) == pytest.approx(30)  # 20 tokens would be there after 12 s


def test_a_refused_request_costs_nothing(quotas: Quotas) -> None:
    assert quotas.charge("ann", 90) == 0
    assert all(quotas.charge("ann", 80) > 0 for _ in range(5))
    assert quotas.charge("ann", 10) == 0


def test_what_is_given_back_can_be_used_at_once(quotas: Quotas) -> None:
    assert quotas.charge("bob", 60) == 0
    quotas.refund("bob", 45)
    assert quotas.charge("bob", 45) == 0
    assert quotas.charge("bob", 1) == pytest.approx(1)


def test_never_more_than_a_minutes_worth_collects(quotas: Quotas, clock: Clock) -> None:
    assert quotas.charge("bob", 10) == 0
    clock.now_s += 3600
    quotas.refund("bob", 10)
    assert quotas.charge("bob", 60) == 0
    assert quotas.charge("bob", 1) == pytest.approx(1)


def test_more_than_a_minutes_worth_never_passes(quotas: Quotas) -> None:
    assert quotas.charge("bob", 61) == math.inf
    assert quotas.charge("bob", 60) == 0


def test_what_has_no_limit_is_not_counted(quotas: Quotas) -> None:
    assert [quotas.charge("bob", 0) for _ in range(1000)] == [0] * 1000
    assert [quotas.charge("eve", 10**9) for _ in range(6)] == [0] * 6


def test_a_key_has_its_own_allowance(quotas: Quotas) -> None:
    assert [quotas.charge("ann", 50) for _ in range(3)] == [0, 0, 30]
    assert quotas.charge("bob", 60) == 0


def test_only_a_whole_key_opens() -> None:
    keys = [ANN, BOB, EVE]
    assert [find_key(keys, key) for key in ("one", "two", "three")] == keys
    assert [find_key(keys, key) for key in ("", "on", "onee", "ONE", ANN.sha256, "t\udcffwo")] == [None] * 6


def test_a_file_says_names_hashes_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    limited = {"name": "bob", "sha256": hash_key("two"), "tokens_per_minute": 60}
    path.write_text(yaml.safe_dump({"keys": [ENTRY, limited]}))
    assert read_keys(path) == (ApiKey("ann", hash_key("one")), BOB)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "keys: Field required"),
        ([ENTRY], "the file: "),
        ({"keys": []}, "keys: "),
        ({"keys": [ENTRY], "key": 1}, "key: Extra"),
        ({"keys": [ENTRY], "a\n\x1bb": 1}, "a b: Extra"),
        ({"keys": [ENTRY, {"name": "bob"}]}, "keys.1.sha256: Field required"),
        ({"keys": [ENTRY | {"sha256": "one"}]}, "keys.0.sha256: "),
        ({"keys": [ENTRY | {"sha256": hash_key("one").upper()}]}, "keys.0.sha256: "),
        ({"keys": [ENTRY | {"name": ""}]}, "keys.0.name: "),
        ({"keys": [ENTRY | {"name": 7}]}, "keys.0.name: "),
        ({"keys": [ENTRY | {"key": "one"}]}, "keys.0.key: Extra"),
        ({"keys": [ENTRY | {"requests_per_minute": 0}]}, "keys.0.requests_per_minute: "),
        ({"keys": [ENTRY | {"tokens_per_minute": 1.5}]}, "keys.0.tokens_per_minute: "),
        ({"keys": [ENTRY | {"tokens_per_minute": "many"}]}, "keys.0.tokens_per_minute: "),
        ({"keys": [ENTRY, ENTRY | {"sha256": hash_key("two")}]}, "two keys have the same name"),
        ({"keys": [ENTRY, ENTRY | {"name": "bob"}]}, "or the same hash"),
    ],
)
def test_a_file_that_says_something_else_is_refused_by_the_place(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigurationError) as caught:
        read_keys(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"keys: [",
        b"keys: \xff\xfe",
        b"a: b: c",
        b"!!python/object:os.system {}",
        b"2001-99-99: 1",
        b"a: !!int x",
        b"a: " + b"9" * 5000,
        b"[" * 2000,
    ],
    ids=range(9),
)
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="cannot be read as a file of keys") as caught:
        read_keys(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({}, "the server has no keys: start it with `gptj-dist serve --api-key`"),
        ({"api_key": ANN}, "the given one is none"),
    ],
)
def test_who_is_no_admin_is_told_whether_the_server_or_the_key_is_the_reason(
    state: dict[str, ApiKey], told: str
) -> None:
    with pytest.raises(NotPermittedError, match=told):
        require_admin(Request({"type": "http", "state": state}))


def test_an_admin_is_let_through() -> None:
    require_admin(Request({"type": "http", "state": {"api_key": ApiKey("ada", hash_key("four"), is_admin=True)}}))
