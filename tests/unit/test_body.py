"""Bodies are read within limits of size and time; JSON that takes long to parse is refused by counting its bytes."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptj_dist.answers.error_responses import BodyTooLargeError
from gptj_dist.answers.json_limits import UNCHECKED_BYTES, check_json
from gptj_dist.answers.request_limits import MAX_JSON_CONTAINERS, MAX_JSON_STRINGS, MAX_JSON_VALUES
from gptj_dist.answers.schema.base import parse_body
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.work import Work
from gptj_dist.errors import InvalidRequestError, TimeoutReachedError
from gptj_dist.serving.counters import IngressMetrics
from gptj_dist.serving.http.body import BodyLimits, BodyRoom, read_body
from gptj_dist.serving.http.endpoints import answering
from gptj_dist.serving.http.meter import HttpMeter
from gptj_dist.serving.http.middleware import LimitHead


def request_of(parts: list[bytes], headers: dict[str, str] | None = None, is_whole: bool = True) -> Request:
    """A request whose body comes in these parts, and then ends, or does not go on."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if is_whole:
        messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def test_a_body_is_read_to_its_end() -> None:
    assert asyncio.run(read_body(request_of([b"abc", b"", b"def"]), Work())) == b"abcdef"


def test_a_body_that_says_that_it_is_too_large_is_refused_unread() -> None:
    request = request_of([], {"content-length": "4000001"}, is_whole=False)
    with pytest.raises(BodyTooLargeError, match="4000000 bytes"):
        asyncio.run(read_body(request, Work()))


def test_when_bodies_have_no_room_together_the_largest_is_given_up_and_small_ones_pass() -> None:
    async def main() -> None:
        slow = [asyncio.create_task(read(request_of([b"x" * size], is_whole=False))) for size in (3, 6)]
        await asyncio.sleep(0)
        assert await read(request_of([b"ab"])) == b"ab"
        with pytest.raises(TimeoutReachedError, match="no room for a body that is slow: 6 bytes"):
            await slow[1]
        assert await read(request_of([b"a" * 7])) == b"a" * 7
        assert not slow[0].done()
        with pytest.raises(TimeoutReachedError, match="8 bytes"):
            await read(request_of([b"a" * 8], is_whole=False))
        slow[0].cancel()
        await asyncio.wait(slow)
        assert await read(request_of([b"a" * 5] * 2)) == b"a" * 10

    room = BodyRoom(most_bytes=10)

    async def read(request: Request) -> bytes:
        return await read_body(request, Work(), room=room)

    asyncio.run(main())


@pytest.mark.parametrize("headers", [{}, {"content-length": "5"}, {"content-length": "many"}])
def test_a_body_that_turns_out_too_large_is_refused_before_its_end(headers: dict[str, str]) -> None:
    request = request_of([b"abc"] * 4, headers, is_whole=False)
    with pytest.raises(BodyTooLargeError, match="10 bytes"):
        asyncio.run(read_body(request, Work(), BodyLimits(most_bytes=10)))


def test_a_body_that_stops_coming_is_refused() -> None:
    request = request_of([b"abc"], is_whole=False)
    with pytest.raises(TimeoutReachedError, match="3 bytes"):
        asyncio.run(read_body(request, Work(), BodyLimits(timeout_s=0.01)))


def test_a_body_that_comes_fast_enough_may_take_longer() -> None:
    limits = BodyLimits(timeout_s=0.05, min_bytes_per_s=1)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        left.pop()
        return {"type": "http.request", "body": b"a" * 10, "more_body": bool(left)}

    left = [None] * 8
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    assert len(asyncio.run(read_body(request, Work(), limits))) == 80


def test_a_client_that_leaves_during_its_upload_is_a_499_and_no_error_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="gptj_dist")
    metrics = IngressMetrics("i")

    async def upload(request: Request) -> Response:
        return Response(await read_body(request, Work()))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        """What is sent to a client that has gone is lost."""

    routes = [Route("/", answering(upload), methods=["POST"])]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b"", "root_path": ""}
    asyncio.run(HttpMeter(Starlette(routes=routes), routes, metrics)(scope, receive, send))
    assert dict(metrics.num_responses) == {("POST", "/", 499): 1}
    assert metrics.num_in_flight == 0
    assert [record.levelname for record in caplog.records if record.name.startswith("gptj_dist")] == ["INFO"]


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ([("x", "a")] * 100, "/", 200),
        ([("x", "a")] * 200, "/", 431),
        ([("x", "a" * 40_000)], "/", 431),
        ([], "/?" + "a" * 40_000, 431),
    ],
)
def test_heads_that_a_proxy_lets_through_are_limited_too(
    headers: list[tuple[str, str]], path: str, status: int
) -> None:
    async def answer(_: Request) -> Response:
        return Response()

    app = Starlette(routes=[Route("/", answer)], middleware=[Middleware(LimitHead)])

    async def call() -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get(path, headers=headers)).status_code

    assert asyncio.run(call()) == status


def refused(body: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_json(body)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "number"),
    [
        ({"n": 1, "prompt": ["a"] * 20_001}, "prompt", 20_003),
        ({"logit_bias": {str(number): 1 for number in range(20_001)}}, "logit_bias", 20_002),
        ({"prompt": [1] * 500_002}, "prompt", 500_001),
        ({"prompt": [[1]] * 10_001}, "prompt", 10_003),
        ({"messages": [{}] * 10_001}, "messages", 10_003),
        ({"prompt": "a", "stop": ['a,[{"\\'] * 20_001}, "stop", 20_004),
    ],
)
def test_json_of_too_many_parts_is_refused_by_field_and_number(fields: dict[str, Any], param: str, number: int) -> None:
    error = refused(json.dumps(fields, separators=(",", ":")).encode())
    assert error.param == param
    assert str(number) in str(error)


@pytest.mark.parametrize("body", [b'"' * 100_000, b"[" * 100_000, b'{"' + b"a" * 100_000 + b'":' + b"[" * 20_000])
def test_json_of_too_many_parts_is_refused_where_no_field_is_in_sight(body: bytes) -> None:
    assert refused(body).param is None


@pytest.mark.parametrize("text", ["[{," * 300_000, '"' * 900_000, "\\" * 900_000, '\\"' * 500_000, ',"\\' * 300_000])
def test_what_is_written_within_strings_does_not_count(text: str) -> None:
    assert parse_body(json.dumps({"prompt": text}).encode(), CompletionRequest).prompt == text


@pytest.mark.parametrize(
    ("part", "most"), [(1, MAX_JSON_VALUES + 1), ("a", MAX_JSON_STRINGS), ([], MAX_JSON_CONTAINERS - 1)]
)
def test_the_limits_of_json_themselves_pass_and_one_part_more_does_not(part: object, most: int) -> None:
    check_json(json.dumps([part] * most).encode())
    assert "is too long" in str(refused(json.dumps([part] * (most + 1)).encode()))


def test_short_json_is_not_counted() -> None:
    check_json(b"[" * UNCHECKED_BYTES)
    assert "is too long" in str(refused(b"[" * (UNCHECKED_BYTES + 1)))


def test_bodies_are_counted_before_they_are_parsed() -> None:
    with pytest.raises(InvalidRequestError, match="20000") as caught:
        parse_body(json.dumps({"prompt": ["a"] * 990_000}).encode(), CompletionRequest)
    assert caught.value.param == "prompt"
