"""The pipelines as the ingress sees them: one handle to all, and the feed by which their tokens come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.errors import GPTJDistError, NotReadyError, StageFailedError
from gptj_dist.params import SamplingParams
from gptj_dist.serving.everyone import Answers, pipeline_metrics, statuses, trace_parts
from gptj_dist.serving.feed import FeedInbox
from gptj_dist.serving.pipeline import PipelineMetrics, PipelineStatus
from gptj_dist.stages.trace import TracePart

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 5.0

LAST_TOKENS_S = 5.0
"""How long a stream's last tokens may be behind the answer of the call that made them."""


class Pipelines:
    """A `TokenSource` whose tokens come from whichever pipeline Serve chooses. Made on a running event loop.

    Args:
        handle: to the deployment whose replicas are pipelines.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._feed = FeedInbox(ray.util.get_node_ip_address())
        self._limits: EngineLimits | None = None
        self._meeting = asyncio.get_running_loop().create_task(self._meet())

    def close(self) -> None:
        """Takes no more tokens."""
        self._meeting.cancel()
        self._feed.stop()

    def limits(self) -> EngineLimits:
        """As `TokenSource` has it."""
        if self._limits is None:
            raise NotReadyError("the model is still loading; try again shortly")
        return self._limits

    def streams(
        self, prompt_ids: Sequence[int], params: SamplingParams, num_choices: int, log_id: str
    ) -> list[AsyncGenerator[Delta, None]]:
        """As `TokenSource` has it."""
        return [self._stream(prompt_ids, params, choice, log_id) for choice in range(num_choices)]

    async def prove_ready(self) -> None:
        """Returns when a pipeline has made a token lately.

        Raises:
            NotReadyError, StageFailedError: none can.
        """
        self.limits()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._handle.prove_ready.remote()
        except (RayError, TimeoutError) as error:
            if isinstance(error, GPTJDistError):  # as an error out of an actor is
                raise
            raise NotReadyError("no pipeline makes a token right now") from error

    async def statuses(self) -> Answers[PipelineStatus]:
        """What every pipeline says of itself. Raises NotReadyError."""
        self.limits()
        return await statuses(self._handle)

    async def metrics(self) -> Answers[PipelineMetrics]:
        """What every pipeline has counted; while the model loads there is none. Raises NotReadyError."""
        return await pipeline_metrics(self._handle)

    async def trace_parts(self) -> Answers[TracePart]:
        """The plans that every pipeline remembers. Raises NotReadyError."""
        self.limits()
        return await trace_parts(self._handle, {})

    async def _stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, choice: int, log_id: str
    ) -> AsyncGenerator[Delta, None]:
        reply_to, mailbox = self._feed.open()
        call = self._handle.generate.remote(prompt_ids, params, choice, reply_to, log_id)
        watcher = asyncio.create_task(_watch(call, mailbox))
        try:
            while True:
                delta = await mailbox.take()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._feed.close(reply_to)
            watcher.cancel()
            call.cancel()

    async def _meet(self) -> None:
        """Waits for the first pipeline. Serve holds calls back until there is one, which a client must not feel."""
        while self._limits is None:
            try:
                self._limits = (await self._handle.status.remote()).limits
            except Exception:
                logger.exception("no pipeline yet")
                await asyncio.sleep(1)


async def _watch(call: DeploymentResponse, mailbox: Mailbox) -> None:
    """Ends a stream whose call fails, or whose tokens do not come."""
    try:
        await call
        await asyncio.sleep(LAST_TOKENS_S)
        mailbox.fail(StageFailedError("the pipeline's tokens were lost on their way"))
    except RayTaskError as error:
        mailbox.fail(error.cause if isinstance(error.cause, GPTJDistError) else error)
    except RayActorError:
        mailbox.fail(StageFailedError("the pipeline's coordinator died"))
    except Exception as error:
        mailbox.fail(error)
