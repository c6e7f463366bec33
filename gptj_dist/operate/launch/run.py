"""One server from its start to its end, for a person at a terminal or a service manager."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import LayerRange, PipelineConfig
from gptj_dist.errors import ConfigurationError, GPTJDistError, StageFailedError, internal_error
from gptj_dist.operate.launch.announcement import announce, needs_noproxy
from gptj_dist.operate.launch.application import RayGoneError, Served, deploy, remove
from gptj_dist.operate.launch.cluster import await_nodes, connected, living_nodes
from gptj_dist.operate.launch.local_ray import LocalRay
from gptj_dist.operate.launch.ready import await_ready
from gptj_dist.operate.launch.session_room import find_room
from gptj_dist.operate.launch.settings import Launch
from gptj_dist.operate.launch.signals import StopSignals
from gptj_dist.operate.launch.start_display import StartDisplay
from gptj_dist.operate.launch.terminal import diverted, open_console, say_last
from gptj_dist.operate.launch.watch import Watcher
from gptj_dist.serving.sockets import why_not_listen


@dataclass(frozen=True, slots=True)
class _Start:
    """A launch, and its circumstances when it began.

    Args:
        display: what happens until the server is ready.
        begin_s: the time, of `time.monotonic`.
        has_proxy: the environment would send requests to the server through a proxy.
    """

    launch: Launch
    console: Console
    display: StartDisplay
    begin_s: float
    has_proxy: bool

    def say(self, line: str) -> None:
        """Prints a line for the user, however long, as one."""
        self.console.print(line, soft_wrap=True)


def start_signals() -> StopSignals:
    """Receives signals from now on. Call before anything that may start a thread."""
    signals = StopSignals(lambda: say_last("Stopped."))
    signals.start()
    return signals


def run_until_stopped(launch: Launch, signals: StopSignals) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP, then finishes running requests and cleans up.

    Args:
        signals: have been started.

    Raises:
        ConfigurationError: the port is taken, Ray does not start or is not there, there is no room, the model does not
            fit, or the trace cannot be written.
        StageFailedError: the pipelines cannot start, or Ray has died.
    """
    console = open_console()
    start = _Start(launch, console, StartDisplay(console), time.monotonic(), needs_noproxy(launch.listen.host))
    try:
        if launch.address is None:
            _serve_here(start, signals)
        else:
            _serve_on_cluster(start, signals, launch.address)
    finally:
        start.display.end()
    console.print("Stopped.")


def _serve_here(start: _Start, signals: StopSignals) -> None:
    """Serves on a local Ray that this process starts."""
    launch, console = start.launch, start.console
    if reason := why_not_listen(launch.listen.host, launch.listen.port):
        raise ConfigurationError(f"{reason}; choose another --port")
    local = LocalRay(find_room())

    def clean_up() -> None:
        say_last("Stopped.")
        local.abandon(is_session_kept=signals.can_finish)

    signals.clean_up = clean_up
    _fetch_all_weights(launch.app.pipeline, console)
    try:
        with diverted(local.noise):
            start.display.show("Starting Ray on this machine")
            local.start(launch.start_timeout_s, start.say)
            try:
                with _pointing_to(local.noise.parent):
                    _serve(start, _deploy(start), signals, local.lost_process)
            finally:
                start.display.end()
                local.stop()
    finally:
        local.discard_empty_logs()


def _serve_on_cluster(start: _Start, signals: StopSignals, address: str) -> None:
    """Serves on a Ray that runs already, and removes the application from it at the end."""

    def say_stopped() -> None:
        hint = f"; `gptj-dist stop --address {address}` removes what is left of the application"
        say_last(f"Stopped{hint if signals.can_finish else ''}.")

    signals.clean_up = say_stopped
    start.display.show(f"Joining Ray at {address}")
    launch = start.launch
    with diverted(Path(os.devnull)), connected(address):
        if launch.wait_nodes is not None:
            await_nodes(launch.wait_nodes, launch.wait_nodes_s, start.display.show, living_nodes)
        signals.let_finish()
        base = _deploy(start)
        try:
            _serve(start, base, signals, lambda: None)
        finally:
            remove(start.launch.name)


@contextmanager
def _pointing_to(logs: Path) -> Iterator[None]:
    """Says with an error where the logs are, unless the settings are at fault. Standard error is diverted to one.

    Raises:
        StageFailedError: in place of any error but a ConfigurationError.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        traceback.print_exc()
        said = str(error) if isinstance(error, GPTJDistError) else internal_error(error)
        raise StageFailedError(f"{said}; logs: {logs}") from error


def _deploy(start: _Start) -> str:
    """As `deploy`, with the display."""
    start.display.show("Starting Serve")
    return deploy(start.launch, start.console)


def _serve(start: _Start, base: str, signals: StopSignals, lost_process: Callable[[], str | None]) -> None:
    """Waits until the deployed application is ready, watches it until it is stopped, and drains it.

    Args:
        base: URL of the server.
        lost_process: gives the name of a process of Ray's own that has ended.

    Raises:
        ConfigurationError, StageFailedError: as `run_until_stopped`.
    """
    from gptj_dist.operate.tracing import tracing  # with Ray, which reads its environment when it is imported

    launch, console = start.launch, start.console
    if not await_ready(launch, base, signals.requested, lost_process, start.display):
        return
    start.display.end()
    signals.let_finish()
    served = Served(launch.name)
    watcher = Watcher(served, signals.requested, lost_process, start.say)
    with nullcontext() if launch.trace is None else tracing(served.pipelines, launch.trace, start.say):
        statuses = served.statuses()
        announce(launch, base, statuses, time.monotonic() - start.begin_s, start.has_proxy, console)
        watcher.start(statuses)
        signals.requested.wait()
        if watcher.failure:
            raise StageFailedError(f"the server has ended: {watcher.failure}")
        _drain(served, launch.app.drain_s, console)


def _drain(served: Served, drain_s: float, console: Console) -> None:
    console.print(f"Draining: requests under way have {drain_s:g} s to end. Another Ctrl-C stops at once.")
    try:
        num_late = served.finish_requests(drain_s)
    except RayGoneError as error:
        raise StageFailedError(f"requests under way may be lost: {error}") from error
    if num_late:
        console.print(f"{num_late} requests took longer than {drain_s:g} s and were cut (--drain-s).")


def _fetch_all_weights(pipeline: PipelineConfig, console: Console) -> None:
    """Downloads the files of all stages in this process, so that the user sees the progress bars of the hub's client.

    Raises:
        CheckpointError: the download failed.
    """
    directory = resolve_model(pipeline.model, pipeline.revision)
    config = read_model_config(directory)

    def note(file: str) -> None:
        if not console.is_terminal:  # else the bar names it
            console.print(f"Fetching {file} ...")

    fetch_weights(pipeline.model, directory, LayerRange.whole(config.num_layers), config, note)
