"""Counts HTTP requests, and logs one line for each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_dist.logs import values
from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.http.disconnect import CLIENT_CLOSED_REQUEST

logger = logging.getLogger(__name__)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNLOGGED_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Probes and scrapers call these every few seconds."""

OTHER = "other"
"""Stands for all methods and paths that are not served, so that clients cannot create time series."""


class HttpMeter:
    """An ASGI application in front of another.

    Args:
        routes: routes of that application.
        metrics: counts the requests.
        clock: seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Iterable[Route],
        metrics: IngressMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._routes = routes
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else OTHER
        path, status, begin_s = self._path(scope), CLIENT_CLOSED_REQUEST, self._clock()

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.num_in_flight += 1
        try:
            await self._app(scope, receive, note_status)
        except Exception:
            status = 500  # sent by Starlette's error middleware, which is outside of this one
            raise
        finally:
            self._metrics.num_in_flight -= 1
            self._metrics.num_responses[method, path, status] += 1
            if path not in UNLOGGED_PATHS:
                took_s = round(self._clock() - begin_s, 6)
                request_id = scope.get("state", {}).get("request_id")
                told = values(request_id=request_id, method=method, path=path, status=status, took_s=took_s)
                logger.info("http request", extra=told)

    def _path(self, scope: Scope) -> str:
        """The path of the route that takes the request, with the names of its parameters in place of their values."""
        return next((route.path for route in self._routes if route.matches(scope)[0] is not Match.NONE), OTHER)
