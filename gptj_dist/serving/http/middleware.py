"""What every call passes before it reaches an endpoint: a request id, and the check of its key."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj_dist.answers.error_responses import error_response, response_headers
from gptj_dist.errors import AuthenticationError
from gptj_dist.serving.keys import ApiKey, find_key

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


class RequireKey:
    """Lets no call through that has no key; whose key it was is in `scope["state"]["api_key"]`.

    Args:
        keys: one or more.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            key = find_key(self._keys, given.strip()) if scheme.lower() == "bearer" else None
            if key is None:
                error = AuthenticationError("this server wants an API key: Authorization: Bearer <key>")
                status, body = error_response(error)
                await JSONResponse(body, status, response_headers(error))(scope, receive, send)
                return
            scope.setdefault("state", {})["api_key"] = key
        await self._app(scope, receive, send)
