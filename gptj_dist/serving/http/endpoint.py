"""An endpoint: a method, a path, a handler, and their documentation; and the response that reports an error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptj_dist.answers.error_responses import error_response, response_headers
from gptj_dist.answers.schema.base import Body

JSON, EVENTS, HTML = "application/json", "text/event-stream", "text/html"

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A method of a path, and the handler that answers it.

    Args:
        path: with parameters as Starlette writes them.
        summary: what it is for, in a sentence.
        body: the schema of a POST's body.
        media: the types of answers.
        is_open: needs no key: it holds nothing that is not in the documentation.
        header: one that it reads, beside those of all calls.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[Body] | None = None
    media: tuple[str, ...] = (JSON,)
    is_open: bool = False
    header: str | None = None


def refusal(error: BaseException) -> Response:
    """The response that reports an error to a client."""
    status, body = error_response(error)
    return JSONResponse(body, status, response_headers(error))
