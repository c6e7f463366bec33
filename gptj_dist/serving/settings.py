"""The arguments of the Serve application, checked before anything is placed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.moderation import load_moderation
from gptj_dist.answers.request_limits import MODERATION_TIMEOUT_S
from gptj_dist.checkpoint.hub import model_name
from gptj_dist.config import (
    DEFAULT_CHAT_MAX_TOKENS,
    DEFAULT_DRAIN_S,
    DEFAULT_SESSION_HEADER,
    DEFAULT_WAKE_TIMEOUT_S,
    PipelineConfig,
    refuse_unknown_keys,
)
from gptj_dist.errors import ConfigurationError, excerpt, one_line
from gptj_dist.logs import LogFormat, LogLevel
from gptj_dist.serving.adapters import GivenAdapters, given_adapters
from gptj_dist.serving.keys import ApiKey, read_keys
from gptj_dist.text.chat import ChatTemplate, read_template
from gptj_dist.text.tool_calls import ToolFormatName

HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
"""A name of a header, as HTTP allows it."""


@dataclass(frozen=True, slots=True)
class AppConfig:
    """What one Serve application serves.

    Args:
        pipeline: the settings of each of its pipelines.
        served_model_names: what clients call the model; none takes the model's own name.
        chat_template: Jinja, in place of the checkpoint's.
        chat: defaults for the chat fields that requests leave out.
        api_keys: keys of which each call needs one; without any, calls need no key.
        cors_origins: web pages that browsers may call it from.
        moderation: `module:callable`, see `answers.moderation`.
        moderation_timeout_s: seconds that one call of the moderator may take.
        ingress_replicas: processes that take HTTP.
        log_format: how a line of a log is written.
        log_level: the least severe events that are logged.
        log_prompts: whether logs show prompts.
        drain_s: how long requests under way may take when the application stops.
        wake_timeout_s: how long a request waits while there is no pipeline.
        resumable: whether a client whose connection broke can get the rest of a stream.
        session_header: header in which clients name the session of a request.
        adapters: those that are there from the start.
        adapter_dir: directory of adapters that are loaded when a request names them; None for none.

    Raises:
        ConfigurationError: the template, the moderator or the header's name is invalid.
    """

    pipeline: PipelineConfig
    served_model_names: tuple[str, ...] = ()
    chat_template: str | None = None
    chat: ChatDefaults = ChatDefaults()  # noqa: RUF009  # frozen
    api_keys: tuple[ApiKey, ...] = ()
    cors_origins: tuple[str, ...] = ()
    moderation: str | None = None
    moderation_timeout_s: float = MODERATION_TIMEOUT_S
    ingress_replicas: int = 1
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    log_prompts: bool = False
    drain_s: float = DEFAULT_DRAIN_S
    wake_timeout_s: float = DEFAULT_WAKE_TIMEOUT_S
    resumable: bool = False
    session_header: str = DEFAULT_SESSION_HEADER
    adapters: GivenAdapters = ()
    adapter_dir: str | None = None

    def __post_init__(self) -> None:
        if not HEADER_NAME.fullmatch(self.session_header):
            raise ConfigurationError(f"session_header must be the name of a header, got {excerpt(self.session_header)}")
        if self.chat_template is not None:
            ChatTemplate(self.chat_template, {})
        if self.moderation is not None:
            load_moderation(self.moderation)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that clients may use; responses have the first."""
        return self.served_model_names or (model_name(self.pipeline.model),)


class Arguments(BaseModel):
    """The `args` of a Serve config other than the fields of `PipelineConfig`. `AppConfig` describes the others.

    Args:
        served_model_name: what clients call the model, one name or a list; by default the model's own name.
        chat_template: a file with Jinja, in place of the checkpoint's template.
        chat_max_tokens: the most tokens of a chat's answer, where the request sets no limit.
        chat_stop: a string or a list of strings that end a chat's answer, where the request has no stop.
        tool_format: how the model writes calls of tools; by default as the chat template does.
        api_keys: a file of hashed keys; without one, calls need no key.
        adapters: paths of the adapters that are there from the start, by name.
    """

    model_config = ConfigDict(strict=True)

    served_model_name: list[str] = []
    chat_template: str | None = None
    chat_max_tokens: int = DEFAULT_CHAT_MAX_TOKENS
    chat_stop: list[str] | None = None
    tool_format: ToolFormatName | None = None
    api_keys: str | None = None
    cors_origins: list[str] = []
    moderation: str | None = None
    moderation_timeout_s: float = Field(MODERATION_TIMEOUT_S, gt=0)
    ingress_replicas: int = Field(1, ge=1)
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    log_prompts: bool = False
    drain_s: float = Field(DEFAULT_DRAIN_S, ge=0)
    wake_timeout_s: float = Field(DEFAULT_WAKE_TIMEOUT_S, gt=0)
    resumable: bool = False
    session_header: str = DEFAULT_SESSION_HEADER
    adapters: dict[str, str] = {}
    adapter_dir: str | None = None


T = TypeVar("T")


def parse_settings(args: Mapping[str, Any]) -> AppConfig:
    """Reads the `args` of a Serve config: fields of `PipelineConfig`, and of `AppConfig`.

    `chat_template` and `api_keys` are read here.

    Raises:
        ConfigurationError: a name is unknown (the message suggests the nearest one), or a value is invalid.
    """
    own_names = list(Arguments.model_fields)
    refuse_unknown_keys(args, [*(field.name for field in fields(PipelineConfig)), *own_names])
    settings = {name: value for name, value in args.items() if name not in own_names}
    if settings.get("kv_cache_gb") == "auto":
        settings["kv_cache_gb"] = None
    others = {name: value for name, value in args.items() if name in own_names}
    for name in ("served_model_name", "chat_stop"):
        if isinstance(others.get(name), str):
            others[name] = [others[name]]
    own = _validated(TypeAdapter(Arguments), others)
    converted = {"served_model_name", "chat_template", "chat_max_tokens", "chat_stop", "tool_format"} | {
        *("api_keys", "cors_origins", "adapters")
    }
    pipeline = _validated(TypeAdapter(PipelineConfig), settings)
    chat_stop = None if own.chat_stop is None else tuple(own.chat_stop)
    return AppConfig(
        pipeline,
        served_model_names=tuple(own.served_model_name),
        chat_template=None if own.chat_template is None else read_template(Path(own.chat_template)),
        chat=ChatDefaults(own.chat_max_tokens, chat_stop, own.tool_format),
        api_keys=() if own.api_keys is None else read_keys(Path(own.api_keys)),
        cors_origins=tuple(own.cors_origins),
        adapters=given_adapters(own.adapters, pipeline),
        **own.model_dump(exclude=converted),
    )


def _validated(adapter: TypeAdapter[T], settings: Mapping[str, Any]) -> T:
    try:
        return adapter.validate_python(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        name = one_line(".".join(map(str, problem["loc"])))[:200]
        raise ConfigurationError(f"{name}: {problem['msg']}, got {excerpt(problem['input'])}") from None
