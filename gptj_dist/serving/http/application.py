"""The HTTP application: endpoints, and the middleware in front of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gptj_dist.answers.error_responses import error_body
from gptj_dist.config import DEFAULT_SESSION_HEADER
from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.http.endpoint import EVENTS, Endpoint
from gptj_dist.serving.http.endpoints import answering
from gptj_dist.serving.http.gate import Gate
from gptj_dist.serving.http.meter import HttpMeter
from gptj_dist.serving.http.middleware import (
    REQUEST_ID_HEADER,
    InTurns,
    LimitHead,
    NoteSession,
    RequestIds,
    RequireKey,
    route_path,
)
from gptj_dist.serving.http.page_files import FILES
from gptj_dist.serving.keys import ApiKey

MAX_PATH_CHARS, MAX_METHOD_CHARS = 100, 20
"""Of a path and a method that are not served, in the error."""


def make_http_app(
    endpoints: Collection[Endpoint],
    metrics: IngressMetrics,
    keys: Sequence[ApiKey],
    cors_origins: Sequence[str],
    has_proxy: bool,
    gate: Gate,
    session_header: str = DEFAULT_SESSION_HEADER,
) -> Starlette:
    """The application.

    Args:
        endpoints: all of them.
        metrics: counts every request.
        keys: a call needs one of them; without any, none is needed.
        cors_origins: web pages that browsers may call it from, such as `https://example.org`; `*` for all.
        has_proxy: Serve's proxies are in front of it.
        gate: closes when the server stops; requests for the model and /ready pass it, the rest is always answered.
        session_header: header in which clients name the session of a request.
    """
    routes = [_route(one, gate) for one in endpoints]
    middleware = [
        Middleware(InTurns),
        Middleware(RequestIds, has_proxy=has_proxy),
        Middleware(HttpMeter, routes=routes, metrics=metrics),
        Middleware(NoteSession, header=session_header),
    ]
    if has_proxy:
        middleware.append(Middleware(LimitHead))
    if cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "retry-after"],
        )
        middleware.append(cors)  # before keys: a browser asks first, without one
    if keys:
        open_paths = {one.path for one in endpoints if one.is_open} | {f"/page/{name}" for name in FILES}
        middleware.append(Middleware(RequireKey, keys=keys, open_paths=open_paths))
    no_such_route = partial(_no_such_route, {one.path for one in endpoints})
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: no_such_route})


def _route(endpoint: Endpoint, gate: Gate) -> Route:
    route = Route(endpoint.path, answering(endpoint.handler), methods=[endpoint.method])
    if endpoint.method == "POST" or EVENTS in endpoint.media or endpoint.path == "/ready":
        route.app = gate.guard(route.app)
    return route


async def _no_such_route(paths: Collection[str], request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "the handler is for no other"
    path = route_path(request.scope)[:MAX_PATH_CHARS]
    message = f"{request.method[:MAX_METHOD_CHARS]} {path} is not served here{_hint(path, paths)}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    body = error_body(message, "invalid_request_error", code=code)
    return JSONResponse(body, error.status_code, error.headers)


def _hint(path: str, paths: Collection[str]) -> str:
    """The end of the error: the path that a client may have meant."""
    if path.startswith("/v1/messages"):
        return ": use /v1/chat/completions or /v1/responses"
    nearest = [] if path in paths else difflib.get_close_matches(path, paths, n=1, cutoff=0.75)
    question = f"; did you mean {nearest[0]}?" if nearest else "."
    return f"{question} GET /docs lists all paths"
