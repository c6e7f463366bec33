"""Gathers the counters of all pipelines and ingresses, so that a scrape of any ingress shows them all."""

from __future__ import annotations

import asyncio

from ray.serve.handle import DeploymentHandle

from gptj_dist.errors import NotReadyError
from gptj_dist.serving.broadcast import ingress_metrics
from gptj_dist.serving.metrics import Exposition, IngressMetrics
from gptj_dist.serving.pipeline import PipelineMetrics
from gptj_dist.serving.pipeline_client import PipelineClient


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
        """Collects all counters. Omits replicas that do not answer, because a scrape must not fail."""
        return Exposition(self._model, *await asyncio.gather(self._of_pipelines(), self._of_ingresses()))

    async def _of_pipelines(self) -> tuple[PipelineMetrics, ...]:
        try:
            return (await self._pipelines.metrics()).given
        except NotReadyError:
            return ()

    async def _of_ingresses(self) -> list[IngressMetrics]:
        try:
            answered = (await ingress_metrics(self._ingresses)).given
        except NotReadyError:
            answered = ()
        return [self._own, *(one for one in answered if one.name != self._own.name)]
