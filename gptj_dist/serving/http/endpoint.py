"""What an endpoint is: a method, a path, a handler, and what the documentation says of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from gptj_dist.answers.schema.base import Body

JSON, EVENTS = "application/json", "text/event-stream"

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is served at a path.

    Args:
        path: with parameters as Starlette writes them.
        summary: what it is for, in a sentence.
        body: what a POST takes.
        media: the types of answers.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[Body] | None = None
    media: tuple[str, ...] = (JSON,)
