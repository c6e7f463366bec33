"""Several async streams as one, in the order in which their items arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from gptj_dist.answers.work import Turns
from gptj_dist.errors import StageFailedError

T = TypeVar("T")


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yields (index of the stream, item). The first error ends all; closing it closes all.

    Of several streams one begins in a turn of the event loop: to begin one may take a call to a pipeline. While nothing
    is read of the merged stream, little is read of them.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for only_item in stream:
                yield 0, only_item
        return
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(len(streams))
    turns = Turns()
    tasks = [asyncio.create_task(_pour(index, stream, items, turns)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await items.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pour(
    index: int, stream: AsyncGenerator[T, None], items: asyncio.Queue[tuple[int, T] | Exception | None], turns: Turns
) -> None:
    try:
        async with aclosing(stream):
            await turns.next()
            async for item in stream:
                await items.put((index, item))
        await items.put(None)
    except Exception as error:
        await items.put(error)
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise  # by `merge`, which no longer reads
        await items.put(StageFailedError("the stream was cancelled"))  # from within
