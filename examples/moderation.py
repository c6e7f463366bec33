"""A moderator for `gptj-dist serve --moderation examples.moderation:moderate`: refuses texts with certain words.

A real one asks a classifier; this shows what it is called with and what it answers.
"""

from __future__ import annotations

import re

REFUSED = re.compile(r"\b(bomb|password)s?\b", re.IGNORECASE)


def moderate(text: str, role: str) -> str | None:
    """None if the text may pass, else why not; `role` is "prompt" or "output"."""
    found = REFUSED.search(text)
    return None if found is None else f"the {role} says {found.group()!r}"
