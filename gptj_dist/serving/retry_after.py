"""Turns an estimate of a wait into what a refused client is told."""

from __future__ import annotations

import math

MAX_RETRY_AFTER_S = 600
"""The longest time that a client is told to wait."""


def retry_after_s(estimate_s: float) -> int:
    """The seconds of a `Retry-After` header: whole ones, from 1 to `MAX_RETRY_AFTER_S`."""
    return min(MAX_RETRY_AFTER_S, max(1, math.ceil(estimate_s)))
