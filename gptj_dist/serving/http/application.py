"""The HTTP application: endpoints, and the middleware in front of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gptj_dist.serving.http.endpoint import Endpoint
from gptj_dist.serving.http.endpoints import answering
from gptj_dist.serving.http.meter import HttpMeter
from gptj_dist.serving.http.middleware import REQUEST_ID_HEADER, LimitHead, RequestIds, RequireKey
from gptj_dist.serving.keys import ApiKey
from gptj_dist.serving.metrics import IngressMetrics


def make_http_app(
    endpoints: Iterable[Endpoint],
    metrics: IngressMetrics,
    keys: Sequence[ApiKey],
    cors_origins: Sequence[str],
    has_proxy: bool,
) -> Starlette:
    """The application.

    Args:
        metrics: counts every request.
        keys: a call needs one of them; without any, none is needed.
        cors_origins: web pages that browsers may call it from, such as `https://example.org`; `*` for all.
        has_proxy: Serve's proxies are in front of it.
    """
    routes = [Route(one.path, answering(one.handler), methods=[one.method]) for one in endpoints]
    middleware = [
        Middleware(RequestIds, has_proxy=has_proxy),
        Middleware(HttpMeter, routes=routes, metrics=metrics),
        Middleware(LimitHead),
    ]
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
        middleware.append(Middleware(RequireKey, keys=keys))
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _no_such_route})


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = f"{request.method} {request.url.path} is not served here; GET /docs lists what is"
    code = "method_not_allowed" if status == 405 else "not_found"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse({"error": body}, status, headers)
