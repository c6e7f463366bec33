"""Fixtures of tests that compute with the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Gives torch its number of threads back after the test."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def one_thread(request: pytest.FixtureRequest) -> None:
    """Where a test does not say otherwise.

    Two would wait for each other most of the time on cores that other processes use.
    """
    request.getfixturevalue("restored_threads")
    torch.set_num_threads(1)
