"""Serve's choice of a pipeline for a call, made by `engine.routing`. Serve runs it in each process with a handle.

Serve pickles this module by value: it holds nothing but the class.
"""

from __future__ import annotations

import random
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from gptj_dist.config import BLOCK_SIZE_TOKENS
from gptj_dist.engine.routing import Router, RoutingFacts


class PrefixRouter(RequestRouter):
    """Sends a prompt to the pipeline where it is done first. Other calls go to any pipeline with few calls."""

    def initialize_state(self) -> None:
        """Called by Serve after its constructor."""
        self._router = Router(BLOCK_SIZE_TOKENS)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas come and go, and when they have published new facts."""
        self._router.meet({replica.replica_id.unique_id: _facts(replica.routing_stats) for replica in replicas})
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Serve. Ranks the replicas; a call of `Pipeline.generate` also gets why it went to the first."""
        if pending_request is None:
            return [candidate_replicas]
        call = pending_request.metadata.internal_request_id
        # Serve finds the request that it has chosen for by this id, which the calls of an HTTP request may share.
        self._pending_requests_by_id[call] = pending_request
        if len(candidate_replicas) < 2 or pending_request.metadata.call_method != "generate":
            return [random.SystemRandom().sample(candidate_replicas, len(candidate_replicas))]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        records, reply_to = pending_request.args
        stream = (reply_to.inbox.endpoint, reply_to.stream_id)
        names, route = self._router.choose(by_name, call, stream, records, time.monotonic())
        pending_request.kwargs["route"] = route
        return [[by_name[name]] for name in names]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a call has ended, however it ended."""
        self._router.end(replica_id.unique_id, internal_request_id)


def _facts(published: dict[str, Any]) -> RoutingFacts | None:
    return RoutingFacts(**published) if published else None
