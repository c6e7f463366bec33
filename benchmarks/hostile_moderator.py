"""A moderator that never returns a verdict on a text with `HANG`, and blocks its thread on one with `BLOCK`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable


def moderate(text: str, role: str) -> Awaitable[str | None] | None:
    """Lets all other texts pass. `role` is `prompt` or `output`."""
    if "BLOCK" in text:
        threading.Event().wait()
    return _never() if "HANG" in text and role == "prompt" else None


async def _never() -> str | None:
    await asyncio.Event().wait()
    return None
