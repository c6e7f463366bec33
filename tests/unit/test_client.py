"""The command line's client of a server: events off the wire, addresses, and refusals in words."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from gptj_dist.cli.client import Server, ServerAddress, base_url, is_this_machine
from gptj_dist.cli.events import read_events
from gptj_dist.cli.text.batch_http import HttpAnswerer
from gptj_dist.cli.text.batch_requests import BatchRequest
from gptj_dist.errors import ConfigurationError, ServerError

STREAM = 'data: {"a": "é\u2028"}\n\n: a comment\r\n\r\nevent: x\ndata: 1\r\ndata:2\r\n\r\ndata: cut off'.encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_their_bytes_arrive(size: int) -> None:
    parts = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    assert list(read_events(parts)) == ['{"a": "é\u2028"}', "1\n2"]


def test_a_byte_that_is_not_utf8_costs_a_character_and_no_traceback() -> None:
    assert list(read_events([b"data: caf\xe9\n\n"])) == ["caf\N{REPLACEMENT CHARACTER}"]


def test_an_event_without_end_is_refused_before_it_fills_the_memory() -> None:
    part = bytes(1 << 20)
    with pytest.raises(ServerError, match="an event of more than"):
        list(read_events(part for _ in range(1 << 20)))
    with pytest.raises(ServerError, match="an event of more than"):
        list(read_events(b"data:" + part + b"\n" for _ in range(1 << 20)))
    assert list(read_events([b": " + part + b"\n"] * 99 + [b"data: 1\n\n"])) == ["1"]


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://host/", "http://host"),
        ("https://host:1/v1/", "https://host:1"),
        ("http://host/model/v1", "http://host/model"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_server_may_be_named_as_a_person_would(given: str, base: str) -> None:
    assert base_url(given) == base


@pytest.mark.parametrize(
    "given",
    [
        *("ftp://host", "host:port", "http://", "", "host:0", "http://[::1", "host:99999"),
        *(
            "http://\0",
            "http://.",
            "http://a..b",
            f"http://{'a' * 300}.com",
            "http://xn--zzzzzz--.de",
            "http://h\u200b",
        ),
    ],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address of a server"):
        base_url(given)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--timeout must be positive"):
        ServerAddress.of("host", None, 0)
    with pytest.raises(ConfigurationError, match="API key"):
        ServerAddress.of("host", "schlüssel", 1)


PROXY = "http://127.0.0.1:9"


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without proxies, to begin with."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of an HTTP server on loopback that answers every request with its first line."""
    listener = FirstLineServer(("127.0.0.1", 0), FirstLine)
    with listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        yield int(listener.server_address[1])
        listener.shutdown()
        thread.join()


class FirstLineServer(socketserver.ThreadingTCPServer):
    daemon_threads = True


class FirstLine(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline().strip()
        while self.rfile.readline().strip():
            pass
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(line)}\r\nconnection: close\r\n\r\n"
        self.wfile.write(head.encode() + line)


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", [PROXY, "socks5://127.0.0.1:9", "socks4://127.0.0.1:9", "nonsense://x"])
def test_this_machine_is_reached_directly_whatever_proxy_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, listening: int, variable: str, proxy: str
) -> None:
    monkeypatch.setenv(variable, proxy)
    for host in ("127.0.0.1", "localhost"):
        address = ServerAddress.of(f"{host}:{listening}", None, 5)
        with Server(address) as server:
            assert server.get("/here").text == "GET /here HTTP/1.1"
        with pytest.raises(ServerError, match="does not answer in JSON"):
            asyncio.run(_ask_in_a_batch(address))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[(host, True) for host in ("127.3.2.1", "[::1]", "0.0.0.0", "x.localhost")],
        *[(host, False) for host in ("10.0.0.1", "localhost.example", "gptj")],
    ],
)
def test_names_and_addresses_of_this_machine(host: str, expected: bool) -> None:
    assert is_this_machine(f"http://{host}:8000") is expected


async def _ask_in_a_batch(address: ServerAddress) -> None:
    async with HttpAnswerer(address, concurrency=1) as answerer:
        await answerer.answer(BatchRequest("1", "/v1/completions", {}))


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_another_machine_is_reached_through_the_proxy(
    monkeypatch: pytest.MonkeyPatch, listening: int, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{listening}")
    with Server(ServerAddress.of("http://gptj.example:8000", None, 5)) as server:
        assert server.get("/there").text == "GET http://gptj.example:8000/there HTTP/1.1"


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ("socks4://user:secret@127.0.0.1:9", r"a proxy of the environment \(http_proxy=127.0.0.1:9\) cannot be used"),
        ("http://127.0.0.1:9", r"no connection to http://gptj.example: Connection refused \(proxies: http_proxy="),
        ("socks5://127.0.0.1:9", r"no connection to http://gptj.example: .*\(proxies: http_proxy="),
    ],
)
def test_a_proxy_that_does_not_work_is_named_in_one_line_without_its_password(
    monkeypatch: pytest.MonkeyPatch, proxy: str, message: str
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises((ConfigurationError, ServerError), match=message) as raised:
        Server(ServerAddress.of("http://gptj.example", None, 5)).get("/")
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def server(answer: Callable[[httpx.Request], httpx.Response], api_key: str | None = None) -> Server:
    return Server(ServerAddress("http://host/model", api_key, 3.0), httpx.MockTransport(answer))


def test_a_request_goes_to_the_path_behind_the_address_with_the_key() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"ok": 1})

    with server(answer, "secret") as asked:
        assert asked.post("/v1/completions", {"prompt": "x"}) == {"ok": 1}
    assert (str(seen[0].url), seen[0].headers["authorization"]) == ("http://host/model/v1/completions", "Bearer secret")


@pytest.mark.parametrize(
    ("status", "error", "headers", "told"),
    [
        (
            400,
            {"message": "max_tokens must be at least 1", "param": "max_tokens"},
            {},
            "max_tokens must be at least 1 (400, param max_tokens); change --max-tokens",
        ),
        (400, {"message": "too long", "param": None}, {}, "too long (400)"),
        (401, {"message": "no key"}, {}, "no key (401); give the server's key with --api-key or GPTJ_API_KEY"),
        (403, {"message": "not an admin's"}, {}, "not an admin's (403)"),
        (429, {"message": "full"}, {"Retry-After": "7"}, "full (429); try again in 7 s"),
        (503, {"message": "still loading"}, {}, "still loading (503); try again shortly"),
        (503, {"message": "busy"}, {"Retry-After": "9" * 400}, "busy (503); try again shortly"),
        (400, {"message": "wrong", "param": ["stop"]}, {}, "wrong (400)"),
        (
            404,
            {"message": "model 'x' is not served", "param": "model"},
            {},
            "model 'x' is not served (404, param model); change --model",
        ),
    ],
)
def test_a_refusal_is_one_line_with_what_is_wrong_and_what_to_do(
    status: int, error: dict[str, Any], headers: dict[str, str], told: str
) -> None:
    with server(lambda _: httpx.Response(status, json={"error": error}, headers=headers)) as asked:
        with pytest.raises(ServerError) as refused:
            asked.post("/v1/completions", {})
        with pytest.raises(ServerError) as refused_stream:
            list(asked.stream("/v1/completions", {}))
    assert str(refused.value) == str(refused_stream.value) == told


@pytest.mark.parametrize(
    "body",
    [b"<html>", b'{"error": "no"}', b'{"error": {"message": 5}}', b"[1]", b"", b"[" * 100_000],
    ids=range(6),
)
def test_a_refusal_in_another_shape_still_names_the_status(body: bytes) -> None:
    with (
        server(lambda _: httpx.Response(500, content=body)) as asked,
        pytest.raises(ServerError, match=r"Internal Server Error \(500\); the server's log says more"),
    ):
        asked.post("/v1/completions", {})


def raising(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def answer(_: httpx.Request) -> httpx.Response:
        raise error

    return answer


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (httpx.ConnectError("x"), "no server answers at http://host/model: x; `gptj-dist serve demo` starts one"),
        (httpx.ReadTimeout("x"), "http://host/model was silent for 3 s; --timeout gives it longer"),
        (httpx.RemoteProtocolError("cut"), "the answer of http://host/model broke off: cut"),
    ],
)
def test_no_answer_is_one_line_too(error: Exception, told: str) -> None:
    with server(raising(error)) as asked:
        for ask in (lambda: asked.get("/x"), lambda: asked.post("/x", {}), lambda: list(asked.stream("/x", {}))):
            with pytest.raises(ServerError) as failed:
                ask()
            assert str(failed.value).startswith(told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'data: {"n": 1}\n\ndata: {"error": {"message": "a stage died"}}\n\n', "the answer broke off: a stage died"),
        (b'data: {"n": 1}\n\n', "the answer of http://host/model broke off"),
        (b'data: {"n": 1}\n\ndata: nonsense\n\n', "something else than JSON objects"),
        (b'data: {"n": 1}\n\ndata: ' + b"[" * 100_000 + b"\n\n", "something else than JSON objects"),
    ],
    ids=range(4),
)
def test_a_stream_without_its_end_is_an_error_after_what_came(content: bytes, told: str) -> None:
    with server(lambda _: httpx.Response(200, content=content)) as asked:
        chunks = asked.stream("/x", {})
        assert next(chunks) == {"n": 1}
        with pytest.raises(ServerError, match=told):
            next(chunks)


class Body(httpx.SyncByteStream):
    """A stream that does not end by itself."""

    def __init__(self) -> None:
        self.is_closed = False

    def __iter__(self) -> Any:
        while True:
            yield b'data: {"n": 1}\n\n'

    def close(self) -> None:
        self.is_closed = True


def test_a_stream_that_is_closed_closes_the_connection() -> None:
    body = Body()
    with (
        server(lambda _: httpx.Response(200, stream=body)) as asked,
        closing(asked.stream("/x", {})) as chunks,
    ):
        assert next(chunks) == {"n": 1}
        assert not body.is_closed
    assert body.is_closed


def test_what_is_asked_of_this_machine_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with Server(ServerAddress("http://127.0.0.1:2", None, 3.0)) as asked, pytest.raises(ServerError) as failed:
        asked.get("/x")
    assert "no server answers at http://127.0.0.1:2" in str(failed.value)
