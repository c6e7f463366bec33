"""Gathers the counters of all pipelines and ingresses, so that a scrape of any ingress shows them all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from ray.serve.handle import DeploymentHandle

from gptj_dist.errors import NotReadyError
from gptj_dist.serving.broadcast import Replies, ask_all
from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.metrics import Exposition
from gptj_dist.serving.pipeline_client import PipelineClient

T = TypeVar("T")


class Scrape:
    """Asks all replicas at each scrape.

    Args:
        model: the name that clients see.
        ingresses: handle to the ingress's own deployment.
        own: counters of this ingress.
    """

    def __init__(self, model: str, pipelines: PipelineClient, ingresses: DeploymentHandle, own: IngressMetrics) -> None:
        self._model = model
        self._pipelines = pipelines
        self._ingresses = ingresses
        self._own = own

    async def take(self) -> Exposition:
        """Collects all counters."""
        pipelines, ingresses = await asyncio.gather(
            _given(self._pipelines.statuses()), _given(ask_all(self._ingresses, IngressMetrics, "metrics"))
        )
        others = (ingress for ingress in ingresses if ingress.name != self._own.name)
        return Exposition(self._model, pipelines, [self._own, *others], self._pipelines.down)


async def _given(replies: Awaitable[Replies[T]]) -> tuple[T, ...]:
    """The replies; none where a replica does not answer, because a scrape must not fail."""
    try:
        return (await replies).given
    except NotReadyError:
        return ()
