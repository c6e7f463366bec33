"""What every call passes before it reaches an endpoint: limits of its head, a request id, and the check of its key."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_dist.answers.error_responses import HeadTooLargeError
from gptj_dist.answers.request_limits import MAX_HEAD_BYTES, MAX_HEADERS
from gptj_dist.answers.work import Turns
from gptj_dist.errors import AuthenticationError
from gptj_dist.serving.http.endpoint import refusal
from gptj_dist.serving.keys import CALLER, SESSION, ApiKey, find_key

REQUEST_ID_HEADER = "x-request-id"
_ACCEPTABLE_ID = re.compile(r"[!-~]{1,128}")


class RequestIds:
    """Takes the call's `x-request-id` or makes one; it is in `scope["state"]["request_id"]` and in the response.

    Args:
        has_proxy: Serve's proxy has done the same, and adds the header to the response itself.
    """

    def __init__(self, app: ASGIApp, has_proxy: bool) -> None:
        self._app = app
        self._has_proxy = has_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and not self._has_proxy:
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class InTurns:
    """Begins one call with a body and one without in a turn of the event loop, or tells one that its client has left.

    A thousand clients that come or leave together hold up neither running streams nor probes of `/health`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turns, self._turns_without_body = Turns(), Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        turns = self._turns if scope.get("method") == "POST" else self._turns_without_body

        async def receive_in_turns() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                await turns.next()
            return message

        await turns.next()
        await self._app(scope, receive_in_turns, send)


class LimitHead:
    """Refuses a call with too many or too long headers, as Serve's proxies let them through.

    The listener's connections do so before a call is made, see `serving.http.connection`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := _head_problem(scope)) is not None:
            await refusal(HeadTooLargeError(problem))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _head_problem(scope: Scope) -> str | None:
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS:
        return f"the request has {len(headers)} headers, and may have {MAX_HEADERS}"
    num_bytes = len(scope["path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
    if num_bytes > MAX_HEAD_BYTES:
        return f"the request's headers have {num_bytes} bytes, and may have {MAX_HEAD_BYTES}"
    return None


class NoteSession:
    """Puts what a header of the call says into `SESSION`.

    Args:
        header: its name.
    """

    def __init__(self, app: ASGIApp, header: str) -> None:
        self._app = app
        self._header = header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            SESSION.set(Headers(scope=scope).get(self._header) or None)
        await self._app(scope, receive, send)


class RequireKey:
    """Lets no call through without a key, except to open paths. The key's entry is in `scope["state"]["api_key"]`,
    and if there are several its name is in `CALLER`.

    Args:
        keys: one or more.
        open_paths: paths that may be read without a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            key = find_key(self._keys, given.strip()) if scheme.lower() == "bearer" else None
            if key is None and not self._is_open(scope):
                error = AuthenticationError("this server needs an API key: Authorization: Bearer <key>")
                await refusal(error)(scope, receive, send)
                return
            if key is not None:
                scope.setdefault("state", {})["api_key"] = key
                CALLER.set(key.name if len(self._keys) > 1 else None)
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["method"] in ("GET", "HEAD") and route_path(scope) in self._open_paths


def route_path(scope: Scope) -> str:
    """The path of a call without the prefix that the application is served at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"
