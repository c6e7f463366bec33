"""`serve --wait-nodes` waits for nodes that are to come."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.launch import cluster
from gptj_dist.operate.launch.cluster import await_nodes


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "NODES_POLL_S", 0.0)


def test_serve_waits_until_the_nodes_are_there_and_says_which_are() -> None:
    looks: Iterator[list[str]] = iter([["a"], ["a"], ["a", "b"]])
    told: list[str] = []
    await_nodes(2, 60.0, told.append, lambda: next(looks))
    assert told == ["Waiting for nodes; 1 of 2 nodes are there: a"] * 2


def test_serve_does_not_wait_for_ever() -> None:
    with pytest.raises(ConfigurationError, match=r"after 0 s 1 of 3 nodes are there: a; `gptj-dist join` adds one"):
        await_nodes(3, 0.0, lambda _: None, lambda: ["a"])
