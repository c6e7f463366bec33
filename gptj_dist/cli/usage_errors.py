"""What a command line that cannot be read gets in place of typer's box: one line, with the nearest value."""

from __future__ import annotations

import difflib
import re

from typer.exceptions import TyperException

_CHOICE = re.compile(r"'([^']*)' is not one of ('.*')\.?$")
_FRAMES = ("Value error, ", ", unable to parse string as an integer")
"""Words of pydantic's around the reason."""


def usage_error_text(error: TyperException, command: str | None) -> str:
    """The error in a line.

    Args:
        command: that was called, if it is known.
    """
    text = " ".join(error.format_message().split())
    for words in _FRAMES:
        text = text.replace(words, "")
    if (match := _CHOICE.search(text)) is not None:
        choices = re.findall("'(.*?)'", match[2])
        nearest = difflib.get_close_matches(match[1].lower(), choices, n=1)
        text = text.removesuffix(".") + (f"; did you mean {nearest[0]!r}?" if nearest else "")
    return f"{text.removesuffix('.')}; see gptj-dist {f'{command} ' if command else ''}--help"
