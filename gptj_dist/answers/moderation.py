"""A hook that checks prompts and answers: GPT-J is not fit to face the public unsupervised.

A moderator is a callable `moderate(text, role)`, plain or `async`. `role` is "prompt" or "output"; the text of an
output is all of it so far, and what is new has not been sent yet. The moderator returns None to let the text pass, or
the reason to refuse it. A plain one runs in threads, several calls at a time, so it must be safe for threads.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import pkgutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Literal, TypeAlias

from gptj_dist.answers.completion import TextDelta
from gptj_dist.answers.request_limits import MODERATION_TIMEOUT_S
from gptj_dist.answers.threads import Threads
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import ConfigurationError, GPTJDistError, InvalidRequestError

Role: TypeAlias = Literal["prompt", "output"]
Moderate: TypeAlias = Callable[[str, Role], str | Awaitable[str | None] | None]

MAX_THREADS = 32
"""Calls of a plain moderator at one time. Those that hang keep their threads."""


class ContentRefusedError(InvalidRequestError):
    """The moderator does not let the prompt pass."""


class ModerationTimeoutError(GPTJDistError):
    """The moderator has not answered in time, so the text cannot pass."""


class Moderation:
    """Calls the moderator on prompts and answers. An error that it raises ends the request as an internal error.

    Args:
        timeout_s: seconds that one call may take.
    """

    def __init__(self, moderate: Moderate, timeout_s: float = MODERATION_TIMEOUT_S) -> None:
        self._moderate = moderate
        self._timeout_s = timeout_s
        self._is_async = any(map(inspect.iscoroutinefunction, (moderate, type(moderate).__call__)))
        self._threads = Threads(MAX_THREADS, "moderation")

    async def check_prompt(self, text: str) -> None:
        """Raises ContentRefusedError if the prompt does not pass, and ModerationTimeoutError."""
        if reason := await self._ask(text, "prompt"):
            raise ContentRefusedError(f"the prompt was refused: {reason}", "prompt")

    async def watch(self, stream: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[TextDelta, None]:
        """The stream as far as it passes; what does not pass is left out and ends it. Raises ModerationTimeoutError."""
        text = ""
        async with aclosing(stream):
            async for delta in stream:
                text += delta.text
                if delta.text and await self._ask(text, "output"):
                    yield TextDelta(
                        "",
                        (),
                        FinishReason.CONTENT_FILTER,
                        prompt_logprobs=delta.prompt_logprobs,
                        num_cached_tokens=delta.num_cached_tokens,
                    )
                    return
                yield delta

    async def _ask(self, text: str, role: Role) -> str | None:
        timeout = asyncio.timeout(self._timeout_s)
        try:
            async with timeout:
                call = functools.partial(self._moderate, text, role)
                verdict = call() if self._is_async else await self._threads.run(call)
                return await verdict if inspect.isawaitable(verdict) else verdict
        except TimeoutError:
            if not timeout.expired():
                raise
            message = f"the moderator has not answered within {self._timeout_s:g} seconds; try again later"
            raise ModerationTimeoutError(message) from None


def load_moderation(path: str, timeout_s: float = MODERATION_TIMEOUT_S) -> Moderation:
    """The moderator that is called `module:callable`.

    Args:
        timeout_s: as of `Moderation`.

    Raises:
        ConfigurationError: there is no such callable.
    """
    module, _, name = path.partition(":")
    try:
        moderate = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"moderation {path!r} is not a module:callable: {error}") from error
    if not callable(moderate):
        raise ConfigurationError(f"moderation {path!r} cannot be called")
    return Moderation(moderate, timeout_s)
