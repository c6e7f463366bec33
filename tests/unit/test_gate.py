"""What clients see while the server stops: answers under way end, new requests are refused at once."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.http.application import make_http_app
from gptj_dist.serving.http.endpoint import Endpoint
from gptj_dist.serving.http.gate import Gate

LIMIT_S = 10.0


class Answers:
    """Endpoints like those of the server: a stream that the test holds up, readiness, liveness."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.may_end = asyncio.Event()

    def table(self) -> list[Endpoint]:
        return [
            Endpoint("POST", "/v1/completions", self.stream, "A stream."),
            Endpoint("GET", "/ready", self.ok, "Readiness."),
            Endpoint("GET", "/health", self.ok, "Liveness."),
            Endpoint("GET", "/v1/models", self.ok, "Models."),
        ]

    async def stream(self, _: Request) -> Response:
        async def parts() -> Any:
            yield b"first "
            self.begun.release()
            await self.may_end.wait()
            yield b"last"

        return StreamingResponse(parts())

    async def ok(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})


def app_of(answers: Answers, gate: Gate) -> Starlette:
    return make_http_app(answers.table(), IngressMetrics("ingress"), (), (), False, gate)


def run(test: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            answers, gate = Answers(), Gate()
            transport = httpx.ASGITransport(app_of(answers, gate))
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                await test(answers, gate, client)

    asyncio.run(limited())


def test_a_stream_under_way_ends_whole_while_new_requests_get_a_503_with_retry_after() -> None:
    async def test(answers: Answers, gate: Gate, client: httpx.AsyncClient) -> None:
        stream = asyncio.create_task(client.post("/v1/completions"))
        await answers.begun.acquire()
        closing = asyncio.create_task(gate.close(LIMIT_S))
        await asyncio.sleep(0)
        refused = await client.post("/v1/completions")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "stopping" in refused.json()["error"]["message"]
        assert not closing.done()
        answers.may_end.set()
        assert (await stream).text == "first last"
        assert await closing == 0

    run(test)


def test_while_it_stops_it_is_alive_but_not_ready() -> None:
    async def test(_: Answers, gate: Gate, client: httpx.AsyncClient) -> None:
        assert (await client.get("/ready")).status_code == 200
        assert await gate.close(LIMIT_S) == 0
        statuses = {path: (await client.get(path)).status_code for path in ("/ready", "/health", "/v1/models")}
        assert statuses == {"/ready": 503, "/health": 200, "/v1/models": 200}

    run(test)


def test_what_does_not_end_in_time_is_counted() -> None:
    async def test(answers: Answers, gate: Gate, client: httpx.AsyncClient) -> None:
        streams = [asyncio.create_task(client.post("/v1/completions")) for _ in range(3)]
        for _ in range(3):
            await answers.begun.acquire()
        assert await gate.close(0) == 3
        answers.may_end.set()
        assert await gate.close(LIMIT_S) == 0
        assert [(await stream).status_code for stream in streams] == [200] * 3

    run(test)


def test_a_request_that_fails_no_longer_counts() -> None:
    async def broken(_: Request) -> Response:
        raise ValueError("broken")

    async def test() -> None:
        gate = Gate()
        transport = httpx.ASGITransport(gate.guard(Route("/broken", broken).app))
        async with httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(ValueError, match="broken"):
                await client.get("http://server/broken")
        assert await gate.close(0) == 0

    asyncio.run(test())
