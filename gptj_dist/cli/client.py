"""A client of a running server: sends JSON, reads JSON and server-sent events, and explains errors to the user."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from gptj_dist.cli.events import read_events
from gptj_dist.errors import ConfigurationError, ServerError, excerpt, one_line
from gptj_dist.json_types import JsonObject
from gptj_dist.serving.sockets import is_loopback

CONNECT_TIMEOUT_S = 10.0
MAX_SHOWN_CHARACTERS = 200
MAX_RETRY_DIGITS = 5
"""Of the seconds in `Retry-After`: a longer time is not believed."""

HINTS = {
    401: "give the server's key with --api-key or GPTJ_API_KEY",
    404: "`gptj-dist status` says what is served there",
    413: "send less at once",
    500: "the server's log says more",
}
"""What to do about a refusal. Those of 429 and 503 depend on when to try again."""

OPTION_FIELDS = frozenset(
    ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "logprobs")
)
"""Fields of a request that the commands have an option for."""

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")

C = TypeVar("C", httpx.Client, httpx.AsyncClient)


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The address of a server, and how to send requests to it.

    Args:
        base: its URL, without the `/v1` of OpenAI's clients.
        timeout_s: how long the server may be silent.
    """

    base: str
    api_key: str | None
    timeout_s: float

    @classmethod
    def of(cls, url: str, api_key: str | None, timeout_s: float) -> ServerAddress:
        """The server that the options name.

        Raises:
            ConfigurationError: not the URL of an HTTP server, or no time at all.
        """
        if not timeout_s > 0:
            raise ConfigurationError(f"--timeout must be positive, got {timeout_s:g}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigurationError("the API key holds characters that no HTTP header can hold")
        return cls(base_url(url), api_key, timeout_s)


class Server:
    """Sends requests to a server. Closing a running stream cancels it on the server.

    Args:
        transport: carries the requests; None is the network.
    """

    def __init__(self, address: ServerAddress, transport: httpx.BaseTransport | None = None) -> None:
        self.base = address.base
        self._timeout_s = address.timeout_s
        self._http = open_client(httpx.Client, address, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> httpx.Response:
        """The answer, whatever its status.

        Raises:
            ServerError: there was none.
        """
        try:
            return self._http.get(path)
        except httpx.HTTPError as error:
            raise self._failure(error) from None

    def post(self, path: str, body: JsonObject) -> JsonObject:
        """The JSON object that answers `body`.

        Raises:
            ServerError: a refusal, or no answer.
        """
        try:
            response = self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise self._failure(error) from None
        if response.status_code != httpx.codes.OK:
            raise refusal(response)
        return json_object(response)

    def stream(self, path: str, body: JsonObject) -> Generator[JsonObject, None, None]:
        """The chunks of an answer, as they come.

        Raises:
            ServerError: a refusal, or an answer that broke off.
        """
        try:
            with self._http.stream("POST", path, json={**body, "stream": True}) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise refusal(response)
                for data in read_events(response.iter_bytes()):
                    if data == "[DONE]":
                        return
                    yield _chunk(data)
        except httpx.HTTPError as error:
            raise self._failure(error) from None
        raise ServerError(f"the answer of {self.base} broke off")

    def _failure(self, error: httpx.HTTPError) -> ServerError:
        return ServerError(failure_text(error, self.base, self._timeout_s))


def base_url(url: str) -> str:
    """Turns `host:port`, or a URL with or without OpenAI's `/v1`, into the URL that paths are appended to.

    Raises:
        ConfigurationError: not the URL of an HTTP server.
    """
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            parts.hostname.encode("idna")
            base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
            if httpx.URL(base).host:
                return base
    except (ValueError, httpx.InvalidURL):  # ValueError: the port is no number, the host no name
        pass
    raise ConfigurationError(f"{url[:MAX_SHOWN_CHARACTERS]!r} is no address of a server, such as 127.0.0.1:8000")


def is_this_machine(base: str) -> bool:
    """Whether the URL's host is a name or an address of the loopback interface."""
    host = urlsplit(base).hostname or ""
    return is_loopback(host) or host.endswith(".localhost") or host in ("0.0.0.0", "::")


def open_client(kind: type[C], address: ServerAddress, **settings: Any) -> C:
    """A client of the server. It reaches this machine directly, others through the proxies of the environment.

    Args:
        kind: `httpx.Client` or `httpx.AsyncClient`.
        settings: more of its arguments.

    Raises:
        ConfigurationError: httpx refuses the proxies of the environment.
    """
    if is_this_machine(address.base):
        settings |= {"trust_env": False, "verify": httpx.create_ssl_context()}
    headers = {} if address.api_key is None else {"Authorization": f"Bearer {address.api_key}"}
    timeout = httpx.Timeout(address.timeout_s, connect=min(address.timeout_s, CONNECT_TIMEOUT_S))
    try:
        return kind(base_url=address.base, headers=headers, timeout=timeout, **settings)
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"a proxy of the environment ({_proxies_text()}) cannot be used: {reason}") from None


def _proxies_text() -> str:
    """`http_proxy=..., all_proxy=...`: the variables that are set, without passwords."""
    found = {name: os.environ.get(name) or os.environ.get(name.upper()) for name in PROXY_VARIABLES}
    return ", ".join(f"{name}={value.rpartition('@')[2]}" for name, value in found.items() if value)


def refusal(response: httpx.Response) -> ServerError:
    """Explains a status other than 200, in one line."""
    message, param = parse_error(response)
    place = f"{response.status_code}, param {param}" if param else str(response.status_code)
    hint = _hint(response, param)
    return ServerError(one_line(f"{message} ({place}){f'; {hint}' if hint else ''}"))


def parse_error(response: httpx.Response) -> tuple[str, str | None]:
    """The message of OpenAI's error shape and the field that it is about, or the status's own words."""
    match _parsed(response.content):
        case {"error": {"message": str(message), **others}}:
            param = others.get("param")
            return message, param if isinstance(param, str) else None
    return response.reason_phrase or f"{response.url} refuses", None


def failure_text(error: httpx.HTTPError, base: str, timeout_s: float) -> str:
    """Explains why there was no answer, and what may help."""
    cause = _cause(error)
    if isinstance(error, httpx.ProxyError):
        return f"the proxy gives no connection to {base}: {error} ({_proxies_text()}; no_proxy excepts hosts)"
    if isinstance(cause, ssl.SSLError):
        return f"no safe connection to {base}: {cause.strerror}; SSL_CERT_FILE names certificates to trust"
    if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
        if not is_this_machine(base) and (proxies := _proxies_text()):
            return f"no connection to {base}: {_reason(cause)} (proxies: {proxies}; no_proxy excepts hosts)"
        return f"no server answers at {base}: {_reason(cause)}; `gptj-dist serve demo` starts one, --url names another"
    if isinstance(error, httpx.TimeoutException):
        return f"{base} was silent for {timeout_s:g} s; --timeout gives it longer"
    return f"the answer of {base} broke off: {_reason(cause)}"


def retry_after_s(response: httpx.Response) -> float | None:
    """How long the server asks to wait, if it does so in seconds."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) <= MAX_RETRY_DIGITS else None


def json_object(response: httpx.Response) -> JsonObject:
    """The body.

    Raises:
        ServerError: something else than a JSON object.
    """
    value = _parsed(response.content)
    if not isinstance(value, dict):
        raise ServerError(f"{response.url} does not answer in JSON: is it a gptj-dist server?")
    return value


def _chunk(data: str) -> JsonObject:
    """One event; an error is the last of a stream that failed under way."""
    chunk = _parsed(data)
    if not isinstance(chunk, dict):
        raise ServerError("the server streams something else than JSON objects")
    if (error := chunk.get("error")) is not None:
        message = error.get("message") if isinstance(error, dict) else error
        reason = one_line(message) if isinstance(message, str) else excerpt(message)
        raise ServerError(f"the answer broke off: {reason}")
    return chunk


def _parsed(text: str | bytes) -> Any:
    """A JSON value; None if the text is no JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _hint(response: httpx.Response, param: str | None) -> str | None:
    if param in OPTION_FIELDS:
        return f"change --{param.replace('_', '-')}"
    if response.status_code in (429, 502, 503, 504):
        seconds = retry_after_s(response)
        return "try again shortly" if seconds is None else f"try again in {seconds:g} s"
    return HINTS.get(response.status_code)


def _cause(error: BaseException) -> BaseException:
    """The operating system's error that caused a library's error, or else the error itself."""
    inner: BaseException | None = error
    while inner is not None and not (isinstance(inner, OSError) and inner.strerror):
        inner = inner.__cause__ or inner.__context__
    return error if inner is None else inner


def _reason(cause: BaseException) -> str:
    if isinstance(cause, ConnectionError) and cause.errno:  # asyncio puts its own text there
        return os.strerror(cause.errno)
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__
