"""A listener on a real socket: heads that are too large or too slow end, and the application never sees them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from benchmarks.servers import free_port
from gptj_dist.answers.request_limits import KEEP_ALIVE_S
from gptj_dist.serving.http.connection import ConnectionLimits
from gptj_dist.serving.http.listener import Address, Listener

LIMITS = ConnectionLimits(head_bytes=2000, headers=10, pipelined_requests=3, linger_s=0.05)
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
WAIT_S = 30
MARGIN_S = 20
"""Before the end of the shortest time that is tried; uvicorn by itself would close after 5 s."""


@dataclass
class Application:
    """Answers `ok` once it has read the body.

    Attributes:
        calls: the body of each call that was read to its end.
        num_begun: calls.
        has_read: a call has been read.
        may_answer: no call is answered before it is set.
        reads_bodies: it answers without.
    """

    calls: list[bytes] = field(default_factory=list)
    num_begun: int = 0
    has_read: asyncio.Event = field(default_factory=asyncio.Event)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    reads_bodies: bool = True

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        self.num_begun += 1
        body, more = b"", self.reads_bodies
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        self.calls.append(body)
        self.has_read.set()
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@dataclass
class Client:
    port: int

    async def answer(self, parts: Iterable[bytes]) -> bytes:
        """Sends the parts, each once the one before has left, and reads until the server closes or aborts."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writing = asyncio.create_task(send(writer, parts))
        try:
            async with asyncio.timeout(WAIT_S):
                return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            writer.close()


async def send(writer: asyncio.StreamWriter, parts: Iterable[bytes]) -> None:
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0)


@asynccontextmanager
async def listening(limits: ConnectionLimits, application: Application) -> AsyncIterator[Client]:
    application.may_answer.set()
    address = Address("127.0.0.1", free_port())
    listener = Listener(application, address, drain_s=1, limits=limits)
    try:
        yield Client(address.port)
    finally:
        await listener.close()


def run(
    scenario: Callable[[Client, Application], Awaitable[None]], limits: ConnectionLimits = LIMITS, **app: Any
) -> None:
    async def main() -> None:
        application = Application(**app)
        async with listening(limits, application) as client:
            await scenario(client, application)

    asyncio.run(main())


def refusal(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["message"]


HEADS = {
    "one header without an end": [HEAD + b"x: ", *[b"a" * 500] * 40_000],
    "a name without an end": [HEAD, *[b"a" * 500] * 40_000],
    "a path without an end": [b"GET /", *[b"a" * 500] * 40_000],
    "an end that comes too late": [HEAD + b"x: " + b"a" * 5000 + b"\r\n\r\n"],
    "many headers": [HEAD, *[b"x: a\r\n" * 4] * 40_000],
    "many headers at once": [HEAD + b"x: a\r\n" * 11 + b"\r\n"],
    "trailers without an end": [HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *[b"x: " + b"a" * 500] * 40_000],
    "a chunk's extension without an end": [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;",
        *[b"a" * 500] * 40_000,
    ],
}


@pytest.mark.parametrize("parts", HEADS.values(), ids=HEADS)
def test_a_head_beyond_the_limits_is_refused_with_the_limit_and_never_answered(parts: list[bytes]) -> None:
    async def scenario(client: Client, application: Application) -> None:
        answer = await client.answer(parts)
        if answer:  # where the call has begun, there is no room for another answer
            status, message = refusal(answer)
            assert status == 431
            assert "2000 bytes" in message or "10 headers" in message
        else:
            assert application.num_begun == 1
        assert application.calls == []

    run(scenario)


def test_a_head_within_the_limits_is_served_byte_by_byte() -> None:
    request = HEAD + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc"

    async def scenario(client: Client, application: Application) -> None:
        answer = await client.answer(bytes([byte]) for byte in request)
        assert answer.endswith(b"ok")
        assert application.calls == [b"abc"]

    run(scenario)


def test_a_body_may_be_larger_than_a_head_whole_or_in_chunks() -> None:
    whole = HEAD + b"Content-Length: 100000\r\n\r\n" + b"a" * 100_000
    chunked = HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + b"40\r\n" + b"b" * 64 + b"\r\n"

    async def scenario(client: Client, application: Application) -> None:
        answer = await client.answer([whole, chunked + (b"40\r\n" + b"b" * 64 + b"\r\n") * 999 + b"0\r\n\r\n"])
        assert answer.count(b"200 OK") == 2
        assert application.calls == [b"a" * 100_000, b"b" * 64_000]

    run(scenario)


def test_a_client_that_does_not_read_its_answer_is_cut_off_and_the_answer_ends() -> None:
    has_ended = asyncio.Event()

    async def answer_without_end(_: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        reading = asyncio.ensure_future(receive_disconnect(receive))
        while not reading.done():
            await send({"type": "http.response.body", "body": b"a" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        has_ended.set()

    async def main() -> None:
        address = Address("127.0.0.1", free_port())
        listener = Listener(answer_without_end, address, 1, ConnectionLimits(unread_s=0.05))
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            await has_ended.wait()
        assert await reader.read(12) == b"HTTP/1.1 200"
        writer.close()
        await listener.close()

    asyncio.run(main())


async def receive_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.mark.parametrize("begin", [b"\r\n", b"GET / HTTP/1.1\r\nx: a"], ids=["empty lines", "half"])
def test_a_head_that_does_not_end_in_time_is_refused_however_its_bytes_come(begin: bytes) -> None:
    async def drip(client: Client, _: Application) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(begin)
        reading = asyncio.create_task(reader.read())
        async with asyncio.timeout(WAIT_S):
            while not reading.done():
                writer.write(b"\r\n" if begin == b"\r\n" else b"a")
                await asyncio.sleep(0.01)
        assert refusal(await reading)[0] == 408
        writer.close()

    run(drip, ConnectionLimits(head_s=0.1, linger_s=0.05))


def test_a_connection_without_a_request_is_closed_in_silence() -> None:
    async def scenario(client: Client, _: Application) -> None:
        assert await client.answer([]) == b""

    run(scenario, ConnectionLimits(keep_alive_s=0))


def test_an_answer_under_way_survives_half_of_the_next_request() -> None:
    async def scenario(client: Client, application: Application) -> None:
        application.may_answer.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            await application.has_read.wait()
            writer.write(b"GET / HTTP")
            await asyncio.sleep(0.1)  # several times the limit for a head
            application.may_answer.set()
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            assert refusal(await reader.read())[0] == 408
        writer.close()

    run(scenario, ConnectionLimits(head_s=0.02, linger_s=0.05))


def test_a_body_that_nobody_reads_does_not_keep_the_connection() -> None:
    def endless() -> Iterable[bytes]:
        yield HEAD + b"Content-Length: 1000000000000\r\n\r\n"
        while True:
            yield b"a" * 10_000

    async def scenario(client: Client, application: Application) -> None:
        await client.answer(endless())  # ends, with the answer or without: bytes may be on their way at the end
        assert application.num_begun == 1

    run(scenario, reads_bodies=False)


def test_a_connection_beyond_the_most_is_told_to_come_again_and_the_others_go_on() -> None:
    async def scenario(client: Client, _: Application) -> None:
        first = (await asyncio.open_connection("127.0.0.1", client.port))[1]
        second = (await asyncio.open_connection("127.0.0.1", client.port))[1]
        await asyncio.sleep(0)
        status, message = refusal(await client.answer([]))
        assert (status, "2 connections" in message) == (503, True)
        first.close()
        second.close()
        await first.wait_closed()
        answer = b""
        async with asyncio.timeout(WAIT_S):
            while b"200 OK" not in answer:
                answer = await client.answer([b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"])

    run(scenario, ConnectionLimits(connections=2, linger_s=0.05))


def test_pipelined_requests_beyond_the_most_end_the_connection() -> None:
    async def scenario(client: Client, application: Application) -> None:
        application.may_answer.clear()
        assert await client.answer([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100]) == b""
        assert application.num_begun == 1

    run(scenario)


def test_bytes_that_are_not_http_are_refused_in_words() -> None:
    async def scenario(client: Client, _: Application) -> None:
        status, message = refusal(await client.answer([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10]))
        assert (status, "not a valid HTTP request" in message) == (400, True)

    run(scenario)


class ClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be put forward.

    Attributes:
        ahead_s: of the machine's clock.
    """

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


@pytest.mark.parametrize("keep_alive_s", [30, KEEP_ALIVE_S])
@pytest.mark.parametrize("has_asked", [False, True], ids=["new", "answered before"])
def test_an_idle_connection_is_kept_for_the_time_of_the_address_and_no_longer(
    keep_alive_s: int, has_asked: bool
) -> None:
    request = HEAD + b"Content-Length: 0\r\n\r\n"

    async def main(loop: ClockLoop) -> None:
        application = Application()
        application.may_answer.set()
        address = Address("127.0.0.1", free_port(), keep_alive_s=keep_alive_s)
        listener = Listener(application, address, drain_s=1)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        while not listener._server.server_state.connections:  # noqa: ASYNC110  # sets no event
            await asyncio.sleep(0)
        for _ in range(1 + has_asked):
            loop.ahead_s += keep_alive_s - MARGIN_S
            for _ in range(3):  # turns, in which the server closes what is due
                await asyncio.sleep(0)
            writer.write(request)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        loop.ahead_s += keep_alive_s
        async with asyncio.timeout(WAIT_S):
            assert await reader.read() == b""
        writer.close()
        await listener.close()

    loop = ClockLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main(loop))
