"""The seam for whoever must keep watch over prompts and answers: GPT-J is not fit to face the public unsupervised.

A moderator is a callable `moderate(text, role)`, plain or `async`. `role` is "prompt" or "output"; the text of an
output is all of it so far, and what is new has not been sent yet. It returns None to let it pass, or the reason to
refuse it. It runs on the event loop that serves everybody, so a slow one has to be `async`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Literal, TypeAlias

from gptj_dist.answers.completion import TextDelta
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import ConfigurationError, InvalidRequestError

Role: TypeAlias = Literal["prompt", "output"]
Moderate: TypeAlias = Callable[[str, Role], str | Awaitable[str | None] | None]


class ContentRefusedError(InvalidRequestError):
    """The moderator does not let the prompt pass."""


class Moderation:
    """Calls the moderator on what goes in and comes out. What it raises ends the request as an internal error."""

    def __init__(self, moderate: Moderate) -> None:
        self._moderate = moderate

    async def check_prompt(self, text: str) -> None:
        """Raises ContentRefusedError if the prompt does not pass."""
        if reason := await self._ask(text, "prompt"):
            raise ContentRefusedError(f"the prompt was refused: {reason}", "prompt")

    async def watch(self, stream: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[TextDelta, None]:
        """The stream as far as it passes; what does not pass is left out and ends it."""
        text = ""
        async with aclosing(stream):
            async for delta in stream:
                text += delta.text
                if delta.text and await self._ask(text, "output"):
                    yield TextDelta("", (), FinishReason.CONTENT_FILTER)
                    return
                yield delta

    async def _ask(self, text: str, role: Role) -> str | None:
        verdict = self._moderate(text, role)
        return await verdict if inspect.isawaitable(verdict) else verdict


def load_moderation(path: str) -> Moderation:
    """The moderator that is called `module:callable`.

    Raises:
        ConfigurationError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        moderate = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"moderation {path!r} is not a module:callable: {error}") from error
    if not callable(moderate):
        raise ConfigurationError(f"moderation {path!r} cannot be called")
    return Moderation(moderate)
