"""The command line's client of a server: events off the wire, addresses, and refusals in words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
import pytest

from gptj_dist.cli.client import Server, ServerAddress, base_url
from gptj_dist.cli.events import read_events
from gptj_dist.errors import ConfigurationError, ServerError

STREAM = 'data: {"a": "é\u2028"}\n\n: a comment\r\n\r\nevent: x\ndata: 1\r\ndata:2\r\n\r\ndata: cut off'.encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_their_bytes_arrive(size: int) -> None:
    parts = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    assert list(read_events(parts)) == ['{"a": "é\u2028"}', "1\n2"]


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


@pytest.mark.parametrize("given", ["ftp://host", "host:port", "http://", "", "host:0", "http://[::1"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address of a server"):
        base_url(given)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--timeout must be positive"):
        ServerAddress.of("host", None, 0)
    with pytest.raises(ConfigurationError, match="API key"):
        ServerAddress.of("host", "schlüssel", 1)


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
        (429, {"message": "full"}, {"Retry-After": "7"}, "full (429); try again in 7 s"),
        (503, {"message": "still loading"}, {}, "still loading (503); try again shortly"),
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


@pytest.mark.parametrize("body", [b"<html>", b'{"error": "no"}', b"[1]", b""])
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
    ],
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
