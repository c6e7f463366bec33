"""HTTP requests are counted by what they asked for, and clients cannot make up what that is."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.http.meter import HttpMeter


async def answer(request: Request) -> Response:
    return Response(status_code=int(request.query_params.get("status", "200")))


async def fail(_: Request) -> Response:
    raise ValueError("broken")


def call(*requests: tuple[str, str]) -> IngressMetrics:
    """What is counted of requests by method and URL."""
    routes = [
        Route("/health", answer),
        Route("/things/{name}", answer, methods=["GET", "POST"]),
        Route("/fail", fail),
    ]
    metrics = IngressMetrics("i")
    meter = HttpMeter(Starlette(routes=routes), routes, metrics, lambda: 0.0)
    transport = httpx.ASGITransport(meter, raise_app_exceptions=False)

    async def scenario() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for method, url in requests:
                await client.request(method, url)

    asyncio.run(scenario())
    return metrics


def test_responses_are_counted_by_method_path_of_the_route_and_status() -> None:
    metrics = call(("GET", "/things/1"), ("GET", "/things/2"), ("POST", "/things/3?status=404"), ("GET", "/health"))
    assert metrics.num_responses == Counter(
        {
            ("GET", "/things/{name}", 200): 2,
            ("POST", "/things/{name}", 404): 1,
            ("GET", "/health", 200): 1,
        }
    )
    assert metrics.num_in_flight == 0


def test_paths_and_methods_that_are_not_served_share_a_name() -> None:
    metrics = call(("GET", "/a"), ("GET", "/b"), ("BREW", "/c"), ("SIP", "/d"), ("DELETE", "/things/1"))
    assert metrics.num_responses == Counter(
        {("GET", "other", 404): 2, ("other", "other", 404): 2, ("DELETE", "/things/{name}", 405): 1}
    )


def test_a_handler_that_fails_is_a_500_and_no_longer_in_flight() -> None:
    metrics = call(("GET", "/fail"))
    assert metrics.num_responses == Counter({("GET", "/fail", 500): 1})
    assert metrics.num_in_flight == 0


def test_while_a_request_is_answered_it_is_in_flight_and_a_client_that_leaves_is_a_499() -> None:
    metrics = IngressMetrics("i")
    num_in_flight: list[int] = []

    async def never_answer(*_: object) -> None:
        num_in_flight.append(metrics.num_in_flight)

    meter = HttpMeter(never_answer, [], metrics)
    scope = {"type": "http", "method": "GET", "path": "/"}
    asyncio.run(meter(scope, None, None))  # type: ignore[arg-type]
    assert num_in_flight == [1]
    assert metrics.num_responses == Counter({("GET", "other", 499): 1})


def test_each_request_is_a_line_but_not_those_of_machines_that_ask_all_the_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="gptj_dist")
    call(("GET", "/health"), ("GET", "/things/secret"))
    (record,) = [record for record in caplog.records if record.name.startswith("gptj_dist")]
    told = vars(record)["values"]
    assert record.getMessage() == "http request"
    assert told == {"method": "GET", "path": "/things/{name}", "status": 200, "took_s": 0.0}
