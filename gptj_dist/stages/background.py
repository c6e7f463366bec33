"""Background tasks whose end is never silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class TaskEndedError(RuntimeError):
    """A background task that should run until it is cancelled has ended without an error."""


def run_in_background(
    name: str, work: Coroutine[Any, Any, None], on_end: Callable[[Exception], None]
) -> asyncio.Task[None]:
    """Runs a coroutine that should end only by cancellation.

    Args:
        name: of the task, for the reason.
        on_end: called with the reason if the coroutine raises or returns. It makes the end visible: it logs it, and it
            fails what waits for the task, starts the task again or makes a health check fail.
    """

    async def watched() -> None:
        try:
            await work
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            on_end(TaskEndedError(f"{name} was cancelled from within"))  # such as by a socket that was closed
        except Exception as error:
            on_end(error)
        else:
            on_end(TaskEndedError(f"{name} ended unexpectedly"))

    return asyncio.create_task(watched(), name=name)
