"""A moderator for `gptj-dist serve --moderation examples.moderation:moderate`: refuses texts with certain words.

A real one calls a classifier. This one shows the arguments and the return value.
"""

from __future__ import annotations

import re

REFUSED = re.compile(r"\b(bomb|password)s?\b", re.IGNORECASE)


def moderate(text: str, role: str) -> str | None:
    """Returns None if the text may pass, else the reason to refuse it. `role` is "prompt" or "output"."""
    found = REFUSED.search(text)
    return None if found is None else f"the {role} contains {found.group()!r}"
