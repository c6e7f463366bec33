"""Sends a batch's requests to a running server."""

from __future__ import annotations

import json
from typing import Self

import httpx

from gptj_dist.cli.client import (
    ServerAddress,
    failure_text,
    json_object,
    open_client,
    parse_error,
    refusal,
    retry_after_s,
)
from gptj_dist.cli.text.batch_answers import BatchAnswer, respond
from gptj_dist.cli.text.batch_requests import BatchRequest
from gptj_dist.cli.text.batch_run import TryAgain

PASSING_STATUSES = (429, 502, 503, 504)
"""The server, or a proxy before it, is busy, loads or restarts."""

_JSON = {"Content-Type": "application/json"}


class HttpAnswerer:
    """Posts requests to a server.

    Args:
        concurrency: maximum number of requests at a time.
        transport: carries the requests; None is the network.
    """

    def __init__(
        self, address: ServerAddress, concurrency: int, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._address = address
        limits = httpx.Limits(max_connections=concurrency)
        self._http = open_client(httpx.AsyncClient, address, limits=limits, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def answer(self, request: BatchRequest) -> BatchAnswer | TryAgain:
        """Posts a request once.

        Raises:
            ServerError: the key is wrong, or another program listens there.
        """
        try:
            response = await self._http.post(request.url, content=json.dumps(request.body), headers=_JSON)
        except httpx.ReadTimeout as error:
            failure = {"code": "timeout", "message": self._failure(error)}
            return BatchAnswer(request.custom_id, response=None, error=failure)
        except httpx.HTTPError as error:
            return TryAgain(self._failure(error))
        return _outcome(request, response)

    def _failure(self, error: httpx.HTTPError) -> str:
        return failure_text(error, self._address.base, self._address.timeout_s)


def _outcome(request: BatchRequest, response: httpx.Response) -> BatchAnswer | TryAgain:
    """Turns a response into the request's answer, or into a reason to try again.

    Raises:
        ServerError: the response would be the same for all requests, so the batch must end.
    """
    status = response.status_code
    message, param = parse_error(response)
    if status in PASSING_STATUSES and response.headers.get("x-should-retry") != "false":
        return TryAgain(f"{message} ({status})", retry_after_s(response))
    if status in (401, 403) or (status == httpx.codes.NOT_FOUND and param != "model"):
        raise refusal(response)
    return respond(request, status, json_object(response), response.headers.get("X-Request-Id"))
