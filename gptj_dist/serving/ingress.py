"""The ingress deployment: HTTP, text and streaming. Starts in seconds, and reaches pipelines through a handle."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from gptj_dist import garbage
from gptj_dist.answers.moderation import Moderation, load_moderation
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.service import AnswerService
from gptj_dist.errors import NotReadyError
from gptj_dist.logs import LogSettings, open_log
from gptj_dist.serving.adapter_registry import AdapterRegistry
from gptj_dist.serving.adapters import AdapterChanges
from gptj_dist.serving.allowances import Allowances
from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.http.admission import Admission
from gptj_dist.serving.http.application import make_http_app
from gptj_dist.serving.http.endpoints import Endpoints
from gptj_dist.serving.http.gate import Gate
from gptj_dist.serving.http.listener import Address, Listener
from gptj_dist.serving.keeper import Keeper
from gptj_dist.serving.loop_watch import LoopWatch
from gptj_dist.serving.loopback import keep_replica_on_node_address
from gptj_dist.serving.pipeline_client import PipelineClient
from gptj_dist.serving.scrape import Scrape
from gptj_dist.serving.settings import AppConfig
from gptj_dist.stages.actor import log_directory, stage_address
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.departures import DrainedNodes, end_nears
from gptj_dist.stages.files import FileSource
from gptj_dist.stages.peer_files import files_here

logger = logging.getLogger(__name__)

LAST_WORDS_S = 2.0
"""Time for interrupted streams to send their error to the client."""

NODE_MARGIN_S = 4.0
"""An ingress ends its streams this long before its node ends: the proxy on that node needs time as well."""

SWITCH_S = 0.001
"""Time that a thread which works may take from the event loop. Python's 5 ms are spent several times for a token."""

CUT = NotReadyError("the server stopped before this answer was complete")
NODE_ENDS = NotReadyError("a machine of the server ended before this answer was complete; send the request again", 1)


@serve.ingress()
class Ingress:
    """Answers HTTP requests with the help of the pipelines.

    Args:
        pipeline: handle to the deployment whose replicas are pipelines.
        accounts: handle to the deployment that keeps the allowances of keys; None if no key is limited.
        listen: address of the ingress's own HTTP server; None leaves HTTP to Serve's proxies.
        streams: handle to the deployment that keeps streams; None if they cannot be resumed.
        source: a node with the model's files, which others may lack.
    """

    def __init__(
        self,
        config: AppConfig,
        pipeline: DeploymentHandle,
        accounts: DeploymentHandle | None = None,
        listen: Address | None = None,
        streams: DeploymentHandle | None = None,
        source: FileSource | None = None,
    ) -> None:
        keep_replica_on_node_address()
        replica = serve.get_replica_context()
        name = replica.replica_id.unique_id
        log = LogSettings(config.log_format, config.model_names[0], name, config.log_level)
        open_log(log_directory(), log, "ingress")
        given = config.pipeline
        pipeline_config, self._files = files_here(given, source, stage_address(given.interface))
        config = replace(config, pipeline=pipeline_config)
        self._metrics = IngressMetrics(name)
        ingresses = serve.get_deployment_handle(replica.deployment, replica.app_name)
        self._adapters = AdapterRegistry(
            name,
            config.adapters,
            config.pipeline,
            config.model_names,
            pipeline,
            ingresses,
            lambda: self._pipelines.limits(),
            config.adapter_dir,
        )
        self._pipelines = PipelineClient(
            pipeline, self._metrics.note_move, self._adapters.exchange, self._adapters.meet, config.wake_timeout_s
        )
        self._metrics.feed_dropped = self._pipelines.dropped
        self._metrics.feed_faults = self._pipelines.feed_faults
        texts = AnswerService(
            ServedModel.load(config.pipeline, config.model_names, config.chat_template, config.chat),
            self._pipelines,
            _moderation(config),
            self._metrics.note_end,
            config.log_prompts,
            self._adapters.sources,
        )
        scrape = Scrape(config.model_names[0], self._pipelines, ingresses, self._metrics)
        admission = Admission(
            config.pipeline.max_batch_size + config.pipeline.max_queued_requests, outage=lambda: self._pipelines.outage
        )
        self._keeper = None if streams is None else Keeper(streams, texts.work)
        allowances = Allowances(accounts)
        endpoints = Endpoints(
            config.model_names, texts, self._pipelines, allowances, scrape, admission, self._keeper, self._adapters
        )
        self._drain_s = config.drain_s
        self._gate = Gate()
        self._app = make_http_app(
            endpoints.table(),
            self._metrics,
            config.api_keys,
            config.cors_origins,
            listen is None,
            self._gate,
            config.session_header,
        )
        self._listener = None if listen is None else Listener(self._app, listen, LAST_WORDS_S)
        garbage.settle()
        garbage.collect_when_quiet(lambda: admission.num_admitted)
        self._watch = LoopWatch(on_hang=_end_process)
        self._metrics.loop_lag = self._watch.lag
        sys.setswitchinterval(SWITCH_S)
        self._ends = [
            run_in_background("watch of the application", self._end_with_application(), _note_no_watch("application")),
            run_in_background("watch of the node", self._end_with_node(), _note_no_watch("node")),
        ]

    def __serve_build_asgi_app__(self) -> Starlette:
        """Called by Serve after the constructor."""
        return self._app

    async def metrics(self) -> IngressMetrics:
        """The counters of this ingress."""
        return self._metrics

    async def take_adapters(self, changes: AdapterChanges) -> AdapterChanges:
        """Takes over what another ingress knows."""
        self._adapters.take(changes)
        return changes

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        self._pipelines.check_health()
        if self._listener is not None:
            self._listener.check_health()

    async def finish(self, timeout_s: float, reason: NotReadyError = CUT) -> int:
        """Refuses new requests, and returns when all running requests are answered.

        Args:
            timeout_s: time limit; requests that take longer fail.
            reason: what these say.

        Returns:
            The number of requests that failed.
        """
        num_late = await self._gate.close(timeout_s)
        if num_late:
            self._pipelines.fail_streams(reason)
            await self._gate.close(LAST_WORDS_S)
        return num_late

    async def _end_with_application(self) -> None:
        """Serve gives an ingress behind its proxies much time to stop; if the application is deleted, it has less."""
        while True:
            await self._pipelines.is_deleted.wait()
            await self.finish(self._drain_s)
            await asyncio.sleep(LAST_WORDS_S)

    async def _end_with_node(self) -> None:
        """Answers that are not complete when the node ends say so, rather than break off."""
        node_id, nodes = ray.get_runtime_context().get_node_id(), DrainedNodes()
        while True:
            await end_nears(nodes.ask, node_id, LAST_WORDS_S + NODE_MARGIN_S)
            await self.finish(0.0, NODE_ENDS)
            await asyncio.sleep(LAST_WORDS_S)

    async def __del__(self) -> None:
        """Called by Serve when the application ends."""
        for task in self._ends:
            task.cancel()
        await self.finish(self._drain_s)
        if self._keeper is not None:
            await self._keeper.close()
        if self._listener is not None:
            await self._listener.close()
        self._pipelines.close()
        self._watch.stop()


def _note_no_watch(what: str) -> Callable[[Exception], None]:
    """Logs that the watch of this has ended."""
    message = f"the ingress will not notice that its {what} ends"
    return lambda error: logger.error(message, exc_info=error)


def _end_process() -> None:
    """Serve replaces the replica. Left to Serve, it would have minutes to stop."""
    os._exit(1)


def _moderation(config: AppConfig) -> Moderation | None:
    return None if config.moderation is None else load_moderation(config.moderation, config.moderation_timeout_s)
