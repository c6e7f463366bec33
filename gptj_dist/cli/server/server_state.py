"""Fetches the state of a running server: readiness, models, version, pipelines. For `status` and `top`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import httpx
import msgspec

from gptj_dist.cli.client import Server, json_object, parse_error, refusal
from gptj_dist.errors import ConfigurationError, NotReadyError
from gptj_dist.json_types import JsonObject
from gptj_dist.serving.debug import DebugDocument


@dataclass(frozen=True, slots=True)
class ServerState:
    """The state of a server.

    Args:
        problem: why it is not ready; None if it is.
        version: None if the server does not say.
        debug: its pipelines; None while there are none.
    """

    base: str
    problem: str | None
    version: str | None
    models: tuple[str, ...]
    debug: DebugDocument | None

    def as_json(self) -> dict[str, Any]:
        """For programs: the pipelines are those of `GET /debug/pipeline`."""
        return {
            "url": self.base,
            "is_ready": self.problem is None,
            "problem": self.problem,
            "version": self.version,
            "models": list(self.models),
            "pipelines": [] if self.debug is None else list(map(asdict, self.debug.pipelines)),
            "down": [] if self.debug is None else list(map(asdict, self.debug.down)),
        }


def look(server: Server) -> ServerState:
    """Fetches the state of the server.

    Raises:
        ServerError: nothing answers at the address, or the server refuses the request.
        ConfigurationError: something else listens there.
    """
    ready = server.get("/ready")
    problem = parse_error(ready)[0] if ready.status_code == httpx.codes.SERVICE_UNAVAILABLE else None
    if problem is None:
        _require_known(ready, server)
    version = server.get("/version")
    models = _require_known(server.get("/v1/models"), server)
    debug: DebugDocument | None = None
    try:
        debug = fetch_pipelines(server)
    except NotReadyError as error:
        problem = problem or str(error)
    return ServerState(
        server.base,
        problem,
        _version(json_object(version)) if version.status_code == httpx.codes.OK else None,
        _model_ids(json_object(models), server),
        debug,
    )


def _version(document: JsonObject) -> str | None:
    version = document.get("version")
    return version if isinstance(version, str) else None


def _model_ids(document: JsonObject, server: Server) -> tuple[str, ...]:
    match document:
        case {"data": list(models)}:
            ids = [model.get("id") for model in models if isinstance(model, dict)]
            return tuple(id for id in ids if isinstance(id, str))
    raise _not_ours(server)


def fetch_pipelines(server: Server) -> DebugDocument:
    """The server's pipelines, and what their stages do.

    Raises:
        NotReadyError: the model is still loading.
        ServerError: nothing answers there, or it refuses to say.
        ConfigurationError: something else listens there.
    """
    response = server.get("/debug/pipeline")
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        raise NotReadyError(f"the model at {server.base} is still loading; try again shortly")
    try:
        return DebugDocument.from_json(_require_known(response, server).content)
    except msgspec.DecodeError:
        raise _not_ours(server) from None


def _not_ours(server: Server) -> ConfigurationError:
    return ConfigurationError(f"the server at {server.base} is not gptj-dist, or of another version")


def _require_known(response: httpx.Response, server: Server) -> httpx.Response:
    """The answer, if it is one of ours.

    Raises:
        ServerError: refused.
        ConfigurationError: there is no such path, so another program listens there.
    """
    if response.status_code == httpx.codes.NOT_FOUND:
        raise ConfigurationError(f"the server at {server.base} is not gptj-dist, or an older one")
    if response.status_code != httpx.codes.OK:
        raise refusal(response)
    return response
