"""A call of a pipeline for completions, whose tokens come by the ingress's feed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.engine.record import RequestRecord
from gptj_dist.errors import GPTJDistError, NotReadyError, PipelineLostError
from gptj_dist.logs import values
from gptj_dist.serving.feed import FeedInbox, ReplyTo

logger = logging.getLogger(__name__)

LAST_TOKENS_S = 5.0
"""How long a stream's last tokens may take after the call that made them has returned."""


class PipelineCall:
    """A call of `Pipeline.generate` for the completions of a prompt.

    It begins when the first choice is read and ends when the last reader has left.

    Args:
        first: takes the first delta out of a mailbox.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        feed: FeedInbox,
        first: Callable[[Mailbox], Awaitable[Delta]],
        records: Sequence[RequestRecord],
    ) -> None:
        self._handle = handle
        self._feed = feed
        self._first = first
        self._records = records
        self._num_read = 0
        self._reply_to: ReplyTo
        self._mailboxes: list[Mailbox]
        self._response: DeploymentResponse
        self._watcher: asyncio.Task[None]

    async def stream(self, choice: int) -> AsyncGenerator[Delta, None]:
        """One of the choices."""
        if not self._num_read:
            self._begin()
        self._num_read += 1
        try:
            delta = await self._first(self._mailboxes[choice])
            yield delta
            while delta.finish_reason is None:
                delta = await self._mailboxes[choice].take()
                yield delta
        finally:
            self._feed.close(self._reply_to.plus(choice))
            self._num_read -= 1
            if not self._num_read:
                self._end()

    def _begin(self) -> None:
        self._reply_to, self._mailboxes = self._feed.open(len(self._records))
        self._response = self._handle.generate.remote(self._records, self._reply_to)
        self._watcher = asyncio.create_task(_watch(self._response, self._mailboxes))

    def _end(self) -> None:
        for choice in range(len(self._records)):
            self._feed.close(self._reply_to.plus(choice))
        self._watcher.cancel()
        with suppress(RayServeException):  # which `_watch` has handed out: no replica has taken the call
            self._response.cancel()


async def _watch(call: DeploymentResponse, mailboxes: Sequence[Mailbox]) -> None:
    """Fails streams that are still open when their call fails, or some time after it returns."""
    failure = await _failure(call)
    for mailbox in mailboxes:
        mailbox.fail(failure)


async def _failure(call: DeploymentResponse) -> Exception:
    try:
        await call
        await asyncio.sleep(LAST_TOKENS_S)
        return PipelineLostError("the pipeline's tokens were lost on their way")
    except RayTaskError as error:
        return error.cause if isinstance(error.cause, GPTJDistError) else error
    except RayActorError:
        return PipelineLostError("the pipeline's coordinator died")
    except RequestCancelledError:  # by `PipelineCall`
        raise asyncio.CancelledError from None
    except RayServeException as error:  # the deployment has failed
        logger.error("no pipeline takes a request", extra=values(error=repr(error)))
        return NotReadyError("no pipeline takes requests right now")
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise  # the streams' readers have left
        return PipelineLostError("the pipeline cancelled the request")
    except Exception as error:
        return error
