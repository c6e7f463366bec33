"""Waits for a condition, with a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T | None], what: str, timeout_s: float = 150.0) -> T:
    """Polls until `condition` returns a true value, and returns that.

    Raises:
        TimeoutError: the condition was not true within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError(f"gave up after {timeout_s:.0f} s waiting until {what}")
