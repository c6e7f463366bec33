"""Answers of a hostile server to the commands that ask one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import httpx
import typer
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from gptj_dist.cli import client
from gptj_dist.cli.client import ServerAddress
from gptj_dist.cli.server.status import status
from gptj_dist.cli.server.top import top
from gptj_dist.cli.streams import complain
from gptj_dist.cli.text import batch_http
from gptj_dist.cli.text.batch_answers import BatchAnswer
from gptj_dist.cli.text.batch_requests import BatchRequest
from gptj_dist.cli.text.chat import chat
from gptj_dist.cli.text.complete import complete
from gptj_dist.errors import GPTJDistError
from tests.fuzzing.strategies import Target, change, damage, numbers, texts, to_json, values

_STAGE = {
    "stage": 0,
    "layers": [0, 1],
    "device": "cpu",
    "node": "n",
    "dtype": "float32",
    "pid": 1,
    "weight_bytes": 3,
    "kv_used_bytes": 1,
    "kv_total_bytes": 2,
    "busy_share": 0.5,
    "bubble_share": 0.1,
}
_PIPELINE = {
    "name": "p",
    "state": "up",
    "pid": 1,
    "num_running": 0,
    "num_waiting": 0,
    "num_in_flight": 0,
    "num_used_blocks": 1,
    "num_blocks": 2,
    "num_preemptions": 0,
    "num_restarts": 1,
    "output_tokens_per_s": 1.0,
    "prompt_tokens_per_s": 1.0,
    "plans_per_s": 1.0,
    "coordinator_share": 0.1,
    "stages": [_STAGE],
}
_CHOICE = {"index": 0, "text": "a", "delta": {"content": "a"}, "finish_reason": "stop"}
_GOOD: Mapping[str, dict[str, Any]] = {
    "/ready": {"status": "ready"},
    "/version": {"version": "1"},
    "/v1/models": {"data": [{"id": "demo"}]},
    "/debug/pipeline": {"model": "demo", "num_silent": 0, "pipelines": [_PIPELINE]},
    "/v1/completions": {"choices": [_CHOICE], "usage": {"completion_tokens": 1}},
    "/v1/chat/completions": {"choices": [_CHOICE]},
    "error": {"error": {"message": "a", "param": "stop", "code": None}},
}
_OTHERS: SearchStrategy[Any] = (
    numbers() | texts() | st.sampled_from((None, [], {}, [{}], "restarting", [_CHOICE], [_PIPELINE], {"a": 1}))
)
_LAST_PARTS = st.just(b"[DONE]") | st.binary(max_size=9)
_STATUSES = st.sampled_from((200, 200, 200, 200, 400, 401, 404, 429, 500, 503))


class Reply(NamedTuple):
    """An answer of the server."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


def _document(draw: DrawFn, good: dict[str, Any]) -> bytes:
    """A good document, changed at its top, or in an object deep in it."""
    document = json.loads(json.dumps(good))
    place, holder = document, None
    while draw(st.booleans()) and (inner := [key for key, value in place.items() if _object_in(value)]):
        key = draw(st.sampled_from(inner))
        holder = (place, key)
        place = _object_in(place[key])
    new = change(draw, place, list(place), _OTHERS)
    if holder is not None:
        holder[0][holder[1]] = [new] if isinstance(holder[0][holder[1]], list) else new
    return to_json(document if holder else new)


def _object_in(value: Any) -> Any:
    if isinstance(value, list) and value:
        return value[0] if isinstance(value[0], dict) else None
    return value if isinstance(value, dict) else None


@st.composite
def _replies(draw: DrawFn, path: str, is_stream: bool) -> Reply:
    status = draw(_STATUSES)
    good = _GOOD[path if status == 200 else "error"]
    if is_stream and status == 200:
        parts = [_document(draw, good) for _ in range(draw(st.integers(0, 3)))]
        parts += [draw(_LAST_PARTS), b"[DONE]"]
        body = damage(draw, b"".join(b"data: " + part + b"\n\n" for part in parts))
    elif draw(st.integers(0, 7)):
        body = damage(draw, _document(draw, good))
    else:
        body = to_json(draw(values()))
    headers = {}
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from((b"retry-after", b"content-type", b"content-encoding", b"x-request-id")))
        headers[name] = draw(
            st.sampled_from((b"7", b"9" * 400, b"-1", b"nan", b"gzip", b"\xff\xfe", b"text/html; charset=x"))
        )
    return Reply(status, headers, body)


def _answering(replies: Mapping[str, Reply]) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        reply = replies[request.url.path]
        return httpx.Response(reply.status, headers=list(reply.headers.items()), stream=httpx.ByteStream(reply.body))

    return answer


_ADDRESS = ServerAddress("http://127.0.0.1:1", None, 1.0)
_PATHS = tuple(path for path in _GOOD if path.startswith("/"))
_MAX_PRINTED_CHARS = 10_000_000


def _run(command: Callable[[], None], replies: Mapping[str, Reply]) -> None:
    """Runs a command against a server with these answers. An error is one line for the user."""
    transport = httpx.MockTransport(_answering(replies))

    def opened(kind: Any, address: ServerAddress, **_: Any) -> Any:
        return kind(base_url=address.base, transport=transport, trust_env=False)

    printed, complaint = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(client, "open_client", opened),
        mock.patch.object(batch_http, "open_client", opened),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(complaint),
    ):
        try:
            command()
        except GPTJDistError as error:
            complain(str(error))
        except typer.Exit:
            pass
    assert len(printed.getvalue()) < _MAX_PRINTED_CHARS
    for line in complaint.getvalue().splitlines():
        assert line.startswith("gptj-dist: "), line
        assert line.isprintable(), line


def _check_commands(replies: dict[str, Reply]) -> None:
    """Each command prints what a server says, or ends with an error for its user."""
    _run(status, replies)
    _run(partial(status, json=True), replies)
    _run(partial(top, once=True), replies)
    _run(partial(complete, "a", no_stream=True), replies)
    _run(partial(complete, "a", json=True), replies)
    _run(lambda: asyncio.run(_ask_in_a_batch()), replies)


def _check_streams(replies: dict[str, Reply]) -> None:
    """Streams are shown as far as they make sense."""
    _run(partial(complete, "a"), replies)
    _run(partial(chat, message="a"), replies)


async def _ask_in_a_batch() -> None:
    async with batch_http.HttpAnswerer(_ADDRESS, 1) as answerer:
        answer = await answerer.answer(BatchRequest("1", "/v1/completions", {}))
        if isinstance(answer, BatchAnswer):
            assert isinstance(answer.num_output_tokens, int)


def _cases(is_stream: bool) -> SearchStrategy[dict[str, Reply]]:
    return st.fixed_dictionaries({path: _replies(path, is_stream) for path in _PATHS})


TARGETS = (
    Target("commands", _cases(is_stream=False), _check_commands, 6),
    Target("streams", _cases(is_stream=True), _check_streams, 4),
)
