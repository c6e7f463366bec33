"""Runs the application for a person at a terminal: starts or joins Ray, shows progress, tells where, cleans up."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import LayerRange, PipelineConfig
from gptj_dist.errors import ConfigurationError, StageFailedError
from gptj_dist.serving.http.listener import Address
from gptj_dist.serving.settings import AppConfig
from gptj_dist.serving.sockets import is_loopback, why_not_listen

APP_NAME = "gptj-dist"
DRAIN_S = 5.0
POLL_S = 0.05
PROGRESS_S = 0.5

LOCAL_RAY_ENVIRONMENT = {
    # Ray listens on all interfaces unless it takes the machine for a desktop (`docs/decisions/0004-loopback.md`).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Calls between deployments take the short way (`docs/decisions/0006-serve-settings.md`).
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Serve's own processes would use a tenth of a core while nothing happens.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
}
"""What Ray is started with. ray and ray.serve read it when they are imported, so it is set before that."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run and where.

    Args:
        scaling: Serve's `num_replicas` or `autoscaling_config`.
        listen: where to take HTTP; a cluster that runs Serve already has decided that itself.
        address: the Ray cluster to join; None starts a local one.
        trace: where to write when each stage computed what, if anywhere.
        name: the Serve application's, of which a cluster may have several.
        route_prefix: what the paths of its endpoints begin with.
        api_key: one of the application's, for its launcher; None if it has none.
        is_open: it may be reached from other machines without a key.

    Raises:
        ConfigurationError: the settings contradict each other, or would open the model to the world.
    """

    app: AppConfig
    scaling: Mapping[str, Any]
    listen: Address
    address: str | None
    trace: Path | None = None
    name: str = APP_NAME
    route_prefix: str = "/"
    api_key: str | None = None
    is_open: bool = False

    def __post_init__(self) -> None:
        if not self.route_prefix.startswith("/"):
            raise ConfigurationError(f"--route-prefix must begin with a slash, got {self.route_prefix!r}")
        if self.address is None and self.route_prefix != "/":
            raise ConfigurationError("--route-prefix is for several models on one cluster; give its --address too")
        if self.address is not None and self.listen.tls_cert is not None:
            raise ConfigurationError(
                "on a cluster Serve's proxies take HTTP, and they know no TLS: put a proxy in front (docs/security.md)"
            )
        self.require_key_at(self.listen.host)

    def require_key_at(self, host: str) -> None:
        """Raises ConfigurationError if other machines would reach the application there, and it wants no key."""
        if not (self.app.api_keys or self.is_open or is_loopback(host)):
            raise ConfigurationError(
                f"{host} is open to other machines, and there is no API key: give --api-key or --api-keys, or "
                "--insecure if nobody else can reach it"
            )


def run_until_interrupted(launch: Launch) -> None:
    """Serves until SIGINT or SIGTERM, then drains and leaves nothing behind.

    Raises:
        ConfigurationError: the port is taken, the cluster is not there or has no room, the trace cannot be written.
        StageFailedError: the pipelines would not start.
    """
    console = Console()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs inherit that it is ignored
        signal.signal(number, _interrupt)
    begin = time.monotonic()
    try:
        with _ray(launch, console), _application(launch, console) as base:
            _await_ready(launch, base, console)
            with _trace(launch):
                _announce(launch, base, time.monotonic() - begin, console)
                signal.pause()
    except KeyboardInterrupt:
        console.print("Stopped.")


@contextmanager
def _ray(launch: Launch, console: Console) -> Iterator[None]:
    """A connection to Ray; a local one ends with it."""
    if launch.address is None:
        if reason := why_not_listen(launch.listen.host, launch.listen.port):
            raise ConfigurationError(f"{reason}; choose another --port")
        _fetch_all_weights(launch.app.pipeline, console)
        console.print("Starting Ray on this machine ...")
    with connected(launch.address):
        signal.signal(signal.SIGTERM, _interrupt)  # again: ray.init has put a handler of its own there
        yield


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray of the given address, or a local one that ends with the context; it prints nothing.

    Raises:
        ConfigurationError: nobody answers at the address, or not a Ray that this process can join.
    """
    if address is not None:
        _require_answer(address)
    if address is None or is_loopback(address.rpartition(":")[0].strip("[]")):
        os.environ.update(LOCAL_RAY_ENVIRONMENT)
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."  # what raylets say of actors, which `log_to_driver` does not stop
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # of different versions Ray speaks in several lines
        raise ConfigurationError(f"cannot join Ray at {address}: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _trace(launch: Launch) -> AbstractContextManager[None]:
    """Writes the trace meanwhile, where one is wanted."""
    from ray import serve

    from gptj_dist.operate.tracing import tracing

    if launch.trace is None:
        return nullcontext()
    return tracing(serve.get_deployment_handle("Pipeline", launch.name), launch.trace)


@contextmanager
def _application(launch: Launch, console: Console) -> Iterator[str]:
    """The application, deployed; gives the URL that its paths follow. Drains it in the end."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    from gptj_dist.serving.app import make_application

    _require_room(launch)
    is_local = launch.address is None
    application = make_application(
        launch.app,
        {**launch.scaling, "graceful_shutdown_timeout_s": DRAIN_S, "graceful_shutdown_wait_loop_s": 0.2},
        listen=launch.listen if is_local else None,
    )
    _require_no_other(launch, console)
    if is_local:
        serve.start(proxy_location="Disabled")
    else:
        serve.start(
            http_options=HTTPOptions(
                host=launch.listen.host, port=launch.listen.port, keep_alive_timeout_s=launch.listen.keep_alive_s
            )
        )
        launch.require_key_at(http_address()[0])
    try:
        _deploy(launch, application)
        yield _base(launch, *((launch.listen.host, launch.listen.port) if is_local else http_address()))
    finally:
        with suppress(KeyboardInterrupt):
            console.print("Draining ...")
            serve.delete(launch.name)


def _base(launch: Launch, host: str, port: int) -> str:
    """The URL at which this machine reaches the application."""
    scheme = "http" if launch.listen.tls_cert is None else "https"
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{reachable}:{port}{launch.route_prefix.rstrip('/')}"


def _deploy(launch: Launch, application: Any) -> None:
    """Hands the application to Serve, and does not wait for it.

    Raises:
        ConfigurationError: Serve will not have it, such as when another application has its route.
    """
    from ray import serve
    from ray.exceptions import RayTaskError

    try:
        serve.run_many(
            [serve.RunTarget(application, name=launch.name, route_prefix=launch.route_prefix)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    except RayTaskError as error:
        raise ConfigurationError(f"Serve refuses the application: {error.cause}") from None


def http_address() -> tuple[str, int]:
    """Where Serve really listens: on a cluster that runs Serve already, host and port were decided when it started."""
    from ray.serve.context import _get_global_client

    http = _get_global_client().http_config
    return http.host, http.port


def _fetch_all_weights(pipeline: PipelineConfig, console: Console) -> None:
    """Downloads what all stages need, here where the progress bars of the hub's client are seen.

    Raises:
        CheckpointError: the hub does not give it out.
    """
    directory = resolve_model(pipeline.model, pipeline.revision)
    config = read_model_config(directory)

    def tell(file: str) -> None:
        if not console.is_terminal:  # else the bar names it
            console.print(f"Fetching {file} ...", highlight=False)

    fetch_weights(pipeline.model, directory, LayerRange.whole(config.num_layers), config, tell)


def _require_answer(address: str) -> None:
    """Ray would try for minutes; a plain `host:port` can be tried at once."""
    host, _, port = address.rpartition(":")
    if "//" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigurationError(f"no Ray answers at {address}: {error.strerror or error}") from None


def _require_room(launch: Launch) -> None:
    """A local cluster does not grow: what does not fit now never will."""
    import ray

    from gptj_dist.serving.app import size_pipeline

    if launch.address is not None:
        return
    scale = launch.scaling.get("autoscaling_config", {}).get("min_replicas", launch.scaling.get("num_replicas", 1))
    size, available = size_pipeline(launch.app.pipeline), ray.cluster_resources()
    for resource in ("CPU", "GPU"):
        wanted = scale * sum(bundle.get(resource, 0.0) for bundle in size.bundles)
        if wanted > available.get(resource, 0.0):
            raise ConfigurationError(
                f"{scale} pipeline(s) of {size.num_stages} stages ask Ray for {wanted:g} {resource}s, this machine has "
                f"{available.get(resource, 0.0):g}; try --{resource.lower()}s-per-stage"
            )


def _require_no_other(launch: Launch, console: Console) -> None:
    """On a cluster that runs Serve already, refuses to replace an application, and says whose address counts."""
    if launch.address is None or (applications := applications_served()) is None:
        return
    if launch.name in applications:
        raise ConfigurationError(
            f"the cluster at {launch.address} already serves an application {launch.name!r}; another --name and "
            "--route-prefix make room for this one beside it"
        )
    console.print("Serve runs on this cluster already: its host and port are used, not --host and --port.")


def applications_served() -> tuple[str, ...] | None:
    """The names of the connected cluster's Serve applications, or None if it runs no Serve."""
    import ray
    from ray import serve

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    return tuple(serve.status().applications)


def _await_ready(launch: Launch, base: str, console: Console) -> None:
    """Returns when a token can be made; shows meanwhile how far the stages have got.

    Raises:
        StageFailedError: the deployment failed for good.
    """
    told, next_progress_s = "", 0.0
    with console.status("Starting Serve ...") as status:
        while not _is_ready(launch, base):
            if time.monotonic() >= next_progress_s:
                next_progress_s = time.monotonic() + PROGRESS_S
                _raise_if_failed(launch)
                progress = _progress(launch)
                status.update(progress)
                if progress != told and not console.is_terminal:
                    console.print(progress)
                told = progress
            time.sleep(POLL_S)


def _is_ready(launch: Launch, base: str) -> bool:
    headers = {} if launch.api_key is None else {"Authorization": f"Bearer {launch.api_key}"}
    request = urllib.request.Request(f"{base}/ready", headers=headers)
    # The certificate is for the name that others call the machine by; here it is the server that was just started.
    context = ssl._create_unverified_context() if base.startswith("https:") else None
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return bool(json.load(response)["status"] == "ready")
    except (OSError, ValueError):
        return False


def _raise_if_failed(launch: Launch) -> None:
    from ray import serve

    application = serve.status().applications.get(launch.name)
    if application is not None and application.status == "DEPLOY_FAILED":
        messages = [deployment.message for deployment in application.deployments.values()]
        lines = [line for message in [*messages, application.message] for line in message.strip().splitlines()]
        errors = [line.strip() for line in lines if "Error" in line]
        raise StageFailedError(f"the pipelines would not start: {(errors or lines or ['no reason known'])[-1]}")


def _progress(launch: Launch) -> str:
    """`Loading the model (stage-0: 9/14 layers, stage-1: fetching model.safetensors) ...`."""
    import ray

    from gptj_dist.stages.group import ACTOR_NAME_PREFIX

    everyone = ray.util.list_named_actors(all_namespaces=True)
    actors = [a for a in everyone if a["name"].startswith(ACTOR_NAME_PREFIX) and f"::{launch.name}#" in a["name"]]
    parts = []
    for actor in sorted(actors, key=lambda a: str(a["name"])):
        with suppress(ray.exceptions.RayError, ValueError):
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            progress = ray.get(handle.progress.remote(), timeout=PROGRESS_S)
            parts.append(f"{actor['name'].rpartition('/')[2]}: {progress}")
    return f"Loading the model ({', '.join(parts)}) ..." if parts else "Placing the stages ..."


def _announce(launch: Launch, base: str, elapsed_s: float, console: Console) -> None:
    """Prints the stages, the address and a request to copy."""
    from ray import serve

    from gptj_dist.operate.tables import stage_table
    from gptj_dist.serving.pipeline import PipelineStatus
    from gptj_dist.stages.actor import log_directory
    from gptj_dist.stages.blueprint import is_lossless

    status: PipelineStatus = serve.get_deployment_handle("Pipeline", launch.name).status.remote().result()
    console.print(stage_table(status.stages, status.limits.kv_tokens))
    model = read_model_config(resolve_model(launch.app.pipeline.model, launch.app.pipeline.revision))
    if launch.app.pipeline.dtype == "auto" and not is_lossless(model, status.stages[0].dtype):
        console.print(
            f"The {model.dtype} weights are rounded to {status.stages[0].dtype}, because the memory is small."
        )
    body = {"prompt": "The state of the Union is", "max_tokens": 40, "stream": True}
    names = " or ".join(launch.app.model_names)
    console.print(f"Ready after {elapsed_s:.1f} s: {names} at {base}", highlight=False)
    key = "" if launch.api_key is None else ' -H "Authorization: Bearer $GPTJ_API_KEY"'
    command = f"curl -N {base}/v1/completions{key} -d '{json.dumps(body)}'"
    console.print(f"\n  {command}\n", highlight=False, soft_wrap=True)
    console.print(f"Logs: {log_directory()}", highlight=False, soft_wrap=True)
    console.print("Ctrl-C stops.")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
