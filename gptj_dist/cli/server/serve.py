"""`gptj-dist serve`: serves a pipeline over HTTP, on a local Ray or on a cluster, until Ctrl-C."""

from __future__ import annotations

import json
import re
import ssl
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_dist.answers.request_limits import KEEP_ALIVE_S, MODERATION_TIMEOUT_S
from gptj_dist.cli.options import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    DEFAULT_START_TIMEOUT_S,
    DEFAULT_WAIT_NODES_S,
    ChatMaxTokens,
    ChatStop,
    DrainS,
    Host,
    Model,
    Port,
    ServedModelName,
    TemplateFile,
    ToolFormat,
    TraceFile,
    parse_chat_stop,
    seconds,
)
from gptj_dist.cli.pipeline_settings import OPTIONS, Settings, takes_settings
from gptj_dist.config import (
    DEFAULT_APP_NAME,
    DEFAULT_CHAT_MAX_TOKENS,
    DEFAULT_DRAIN_S,
    DEFAULT_IDLE_S,
    DEFAULT_SESSION_HEADER,
    DEFAULT_WAKE_TIMEOUT_S,
    PipelineConfig,
)
from gptj_dist.errors import ConfigurationError, excerpt
from gptj_dist.logs import LogFormat, LogLevel

if TYPE_CHECKING:
    from gptj_dist.serving.keys import ApiKey


@takes_settings(*OPTIONS)
def serve(
    model: Model,
    settings: Settings,
    replicas: Annotated[int | None, typer.Option(min=1, help="Number of pipelines.")] = None,
    min_replicas: Annotated[int | None, typer.Option(min=0, help="Fewest pipelines, when scaling by load.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Most pipelines, when scaling by load.")] = None,
    idle_s: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=10, help="With --min-replicas 0: how long the last stays unused."),
    ] = DEFAULT_IDLE_S,
    wake_timeout_s: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="How long a request waits while there is no pipeline.")
    ] = DEFAULT_WAKE_TIMEOUT_S,
    served_model_name: ServedModelName = None,
    host: Host = DEFAULT_HOST,
    port: Port = DEFAULT_PORT,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must have.", envvar="GPTJ_API_KEY", show_default=False)
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hashed keys with names and limits: docs/security.md.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Open to other machines without a key.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate, in PEM form.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key.")] = None,
    keep_alive_s: Annotated[
        int, typer.Option(metavar="SECONDS", help="How long a client's idle connection is kept.")
    ] = KEEP_ALIVE_S,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web page that browsers may call from; again for another.")
    ] = None,
    chat_template: TemplateFile = None,
    chat_max_tokens: ChatMaxTokens = DEFAULT_CHAT_MAX_TOKENS,
    chat_stop: ChatStop = None,
    tool_format: ToolFormat = None,
    moderation: Annotated[
        str | None, typer.Option(metavar="MODULE:CALLABLE", help="Asked whether prompts and answers may pass.")
    ] = None,
    moderation_timeout_s: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.001, help="How long one call of the moderator may take.")
    ] = MODERATION_TIMEOUT_S,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; without it a local one is started.", envvar="RAY_ADDRESS")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the Serve application on a cluster.")] = DEFAULT_APP_NAME,
    route_prefix: Annotated[str, typer.Option(help="What its paths begin with on a cluster.")] = "/",
    trace: TraceFile = None,
    log_format: Annotated[LogFormat, typer.Option(help="How a line of a log is written.")] = "text",
    log_level: Annotated[LogLevel, typer.Option(help="The least severe events that are logged.")] = "info",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Show prompts in logs.")] = False,
    drain_s: DrainS = DEFAULT_DRAIN_S,
    resumable: Annotated[
        bool,
        typer.Option("--resumable", help="Keep streams for clients whose connection breaks (docs/api.md)."),
    ] = False,
    session_header: Annotated[
        str, typer.Option(metavar="NAME", help="Header by which requests of a session go to the same pipeline.")
    ] = DEFAULT_SESSION_HEADER,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="LoRA adapter that requests can name; again for another."),
    ] = None,
    adapter_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Adapters in it are loaded when a request names them.")
    ] = None,
    start_timeout_s: Annotated[
        float, typer.Option(metavar="SECONDS", parser=seconds, help="How long Ray may take to start on this machine.")
    ] = DEFAULT_START_TIMEOUT_S,
    wait_nodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Wait until the cluster has N nodes before placing stages.")
    ] = None,
    wait_nodes_s: Annotated[
        float, typer.Option(metavar="SECONDS", parser=seconds, help="How long to wait for them.")
    ] = DEFAULT_WAIT_NODES_S,
) -> None:
    """Serve a model over HTTP as a pipeline of stages, until Ctrl-C.

    Ctrl-C, SIGTERM or a closed terminal end it: new requests are refused, those under way may finish; a second Ctrl-C
    ends it at once.
    """
    scaling = _scaling(replicas, min_replicas, max_replicas, idle_s)
    from gptj_dist.operate.launch.run import run_until_stopped, start_signals
    from gptj_dist.stages.blueprint import draw_blueprint
    from gptj_dist.stages.trace import check_trace_path

    check_trace_path(trace)
    signals = start_signals()
    config = draw_blueprint(PipelineConfig(model, **settings)).config  # what is wrong with it is said before Ray starts
    from gptj_dist.answers.chat_defaults import ChatDefaults
    from gptj_dist.operate.launch.settings import Launch
    from gptj_dist.serving.adapters import given_adapters
    from gptj_dist.serving.http.listener import Address
    from gptj_dist.serving.settings import AppConfig
    from gptj_dist.text.chat import read_template

    sys.path.insert(0, "")  # a moderator may lie where the server is started, as it may for any module
    keys, launcher_key = _keys(api_key, api_keys)
    app = AppConfig(
        config,
        served_model_names=tuple(served_model_name or ()),
        chat_template=None if chat_template is None else read_template(chat_template),
        chat=ChatDefaults(chat_max_tokens, parse_chat_stop(chat_stop), tool_format),
        api_keys=keys,
        cors_origins=tuple(cors_origin or ()),
        moderation=moderation,
        moderation_timeout_s=moderation_timeout_s,
        log_format=log_format,
        log_level=log_level,
        log_prompts=log_prompts,
        drain_s=drain_s,
        wake_timeout_s=wake_timeout_s,
        resumable=resumable,
        session_header=session_header,
        adapter_dir=None if adapter_dir is None else str(adapter_dir.absolute()),
        adapters=given_adapters(_lora_modules(lora_modules or ()), config),
    )
    listen = Address(host, port, *_tls(tls_cert, tls_key), keep_alive_s)
    launch = Launch(
        app,
        scaling,
        listen,
        address,
        trace,
        name,
        route_prefix,
        launcher_key,
        is_open=insecure,
        start_timeout_s=start_timeout_s,
        wait_nodes=wait_nodes,
        wait_nodes_s=wait_nodes_s,
    )
    run_until_stopped(launch, signals)


def _keys(api_key: str | None, file: Path | None) -> tuple[tuple[ApiKey, ...], str | None]:
    """The keys that open the server, one of them for its launcher; and that one.

    Raises:
        ConfigurationError: the key cannot be sent in a header, or the file is invalid.
    """
    from gptj_dist.serving.keys import ApiKey, hash_key, new_key, read_keys

    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise ConfigurationError("an API key is one or more ASCII letters, digits or signs, without spaces")
    named = () if file is None else read_keys(file)
    single = () if api_key is None else (ApiKey("api-key", hash_key(api_key), is_admin=True),)
    if not named and not single:
        return (), None
    own = new_key()
    return (*named, *single, ApiKey("launcher", hash_key(own))), own


def _lora_modules(modules: Iterable[str]) -> dict[str, str]:
    """Adapters' paths by name, given as vLLM takes them: `NAME=PATH`, or JSON with `name` and `path`.

    Raises:
        ConfigurationError: one is neither, or two have the same name.
    """
    paths: dict[str, str] = {}
    for module in modules:
        name, _, path = module.partition("=")
        if module.startswith("{"):
            try:
                given = json.loads(module)
                name, path = str(given["name"]), str(given["path"])
            except (ValueError, KeyError) as error:
                raise ConfigurationError(f"--lora-modules {excerpt(module)} is no JSON with name and path") from error
        if not name or not path:
            raise ConfigurationError(f"--lora-modules takes NAME=PATH, got {excerpt(module)}")
        if name in paths:
            raise ConfigurationError(f"--lora-modules names {excerpt(name)} twice")
        paths[name] = path
    return paths


def _tls(cert: Path | None, key: Path | None) -> tuple[str | None, str | None]:
    """The files of a certificate, which are tried out.

    Raises:
        ConfigurationError: one is missing, or they do not belong together.
    """
    if cert is None and key is None:
        return None, None
    if cert is None or key is None:
        raise ConfigurationError("--tls-cert and --tls-key belong together")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigurationError(f"{cert} and {key} cannot be used for TLS: {error.strerror or error}") from error
    return str(cert.absolute()), str(key.absolute())


def _scaling(
    replicas: int | None, min_replicas: int | None, max_replicas: int | None, idle_s: float
) -> dict[str, object]:
    """Serve's settings for the number of pipelines.

    Raises:
        ConfigurationError: numbers that contradict each other.
    """
    if min_replicas is None and max_replicas is None:
        return {"num_replicas": replicas or 1}
    if replicas is not None:
        raise ConfigurationError("--replicas fixes the number of pipelines, --min-replicas and --max-replicas scale it")
    least = 1 if min_replicas is None else min_replicas
    most = max(least, 1) if max_replicas is None else max_replicas
    if least > most:
        raise ConfigurationError(f"--min-replicas {least} and --max-replicas {most} contradict each other")
    bounds = {"min_replicas": least, "max_replicas": most}
    return {"autoscaling_config": {**bounds, "downscale_to_zero_delay_s": idle_s}}
