"""Errors over HTTP: the one table from exception to status and OpenAI's error shape.

Knows neither FastAPI nor Ray: it returns a status, a body and a header's value for the ingress to send.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gptj_dist.answers.moderation import ContentRefusedError, ModerationTimeoutError
from gptj_dist.errors import (
    AuthenticationError,
    InvalidRequestError,
    NotPermittedError,
    NotReadyError,
    RequestTooLongError,
    StageFailedError,
    TimeoutReachedError,
    TooManyRequestsError,
)


class HeadTooLargeError(InvalidRequestError):
    """The request has more headers, or more bytes of them, than the server takes."""


class BodyTooLargeError(InvalidRequestError):
    """The request's body has more bytes than the server takes."""


class UnsupportedEncodingError(InvalidRequestError):
    """The request's body is compressed in a way that the server does not read."""


class UnknownModelError(InvalidRequestError):
    """The request names a model that is not served here."""


class UnknownStreamError(InvalidRequestError):
    """The request asks for the rest of a stream that is not kept."""


class HttpError(NamedTuple):
    """How an error is reported to a client; `retry_after_s` is None where the same request would fail again."""

    status: int
    type: str
    code: str | None = None
    retry_after_s: int | None = None


# A pipeline that loads or restarts a small model is back in about this time; a large one takes a few tries.
RESTART_S = 5

HTTP_ERRORS: Mapping[type[BaseException], HttpError] = {
    InvalidRequestError: HttpError(400, "invalid_request_error"),
    RequestTooLongError: HttpError(400, "invalid_request_error", "context_length_exceeded"),
    UnknownModelError: HttpError(404, "invalid_request_error", "model_not_found"),
    UnknownStreamError: HttpError(404, "invalid_request_error", "stream_not_found"),
    ContentRefusedError: HttpError(400, "invalid_request_error", "content_filter"),
    UnsupportedEncodingError: HttpError(415, "invalid_request_error"),
    BodyTooLargeError: HttpError(413, "invalid_request_error"),
    HeadTooLargeError: HttpError(431, "invalid_request_error"),
    TimeoutReachedError: HttpError(408, "timeout", "timeout"),
    AuthenticationError: HttpError(401, "authentication_error", "invalid_api_key"),
    NotPermittedError: HttpError(403, "permission_error", "not_permitted"),
    TooManyRequestsError: HttpError(429, "rate_limit_error", "rate_limit_exceeded"),
    NotReadyError: HttpError(503, "service_unavailable", "not_ready", RESTART_S),
    StageFailedError: HttpError(503, "service_unavailable", "stage_failed", RESTART_S),
    ModerationTimeoutError: HttpError(503, "service_unavailable", "moderation_timeout", RESTART_S),
    BaseException: HttpError(500, "internal_error"),
}


def http_error(error: BaseException) -> HttpError:
    """The table's entry for the nearest class that `error` is an instance of."""
    return next(HTTP_ERRORS[cls] for cls in type(error).__mro__ if cls in HTTP_ERRORS)


def error_response(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for `error`. An error not raised on purpose stays unexplained: it is for the log."""
    kind = http_error(error)
    # Not str(error): an error out of an actor is also a RayTaskError, whose text is the remote traceback, paths and
    # all, and whose first argument is the error that was raised.
    message = "".join(map(str, error.args[:1]))
    if kind.status == 500:
        message = "internal error; the server's log says more"
    param = error.param if isinstance(error, InvalidRequestError) else None
    return kind.status, error_body(message, kind.type, param, kind.code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def retry_after_s(error: BaseException) -> int | None:
    """Seconds for the `Retry-After` header, or None where there is to be none."""
    if isinstance(error, NotReadyError):
        return error.retry_after_s or http_error(error).retry_after_s
    return error.retry_after_s if isinstance(error, TooManyRequestsError) else http_error(error).retry_after_s


def response_headers(error: BaseException) -> dict[str, str]:
    """Headers of the response: when to try again, whether to, and how to show a key."""
    headers = {}
    if (retry := retry_after_s(error)) is not None:
        headers["Retry-After"] = str(retry)
    elif http_error(error).status in (408, 429):  # OpenAI's clients would try these again by themselves
        headers["x-should-retry"] = "false"
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return headers
