"""Work for a client that goes before there is an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from gptj_dist.serving.http.disconnect import unless_gone


def request_of(messages: list[dict[str, Any]]) -> Request:
    """A request whose client sends these, and then nothing."""

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


def test_a_client_that_stays_gets_the_answer() -> None:
    async def work() -> Response:
        await asyncio.sleep(0)
        return PlainTextResponse("done")

    assert asyncio.run(unless_gone(request_of([]), work())).body == b"done"


def test_the_work_for_a_client_that_goes_has_ended_before_the_return() -> None:
    ended: list[bool] = []

    async def work() -> Response:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)
        raise AssertionError("nothing sets the event")

    with pytest.raises(ClientDisconnect):
        asyncio.run(unless_gone(request_of([{"type": "http.disconnect"}]), work()))
    assert ended == [True]


def test_an_error_of_the_work_is_the_callers() -> None:
    async def work() -> Response:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        asyncio.run(unless_gone(request_of([]), work()))
