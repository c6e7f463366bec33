"""Starts servers, ours and vLLM's, as processes for a measurement, and stops them after it. Stdlib only."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from benchmarks.vllm_settings import split_settings

ROOT = Path(__file__).parent.parent
READY_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30
POLL_S = 0.02

GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Where Linux names the first and the last port that it gives to programs that ask for any."""
FIRST_PORT = 20_000
"""Ray's processes take ports below this one."""


@contextmanager
def started(
    model: str, serve_args: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, float]]:
    """Runs `gptj-dist serve` until the context ends. Yields its URL and the seconds until it was ready.

    Clients name the model by `model`, even if that is a path.
    """
    port = free_port()
    command = [*serve_command(model, {"served_model_name": model}, port), *serve_args]
    with running(command, environment or os.environ, port, "/ready") as ready:
        yield ready


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], port: int, ready_path: str, directory: Path | None = None
) -> Iterator[tuple[str, float]]:
    """Runs a server's command until the context ends. Yields its URL and the seconds until it was ready."""
    base = f"http://127.0.0.1:{port}"
    begin = time.perf_counter()
    server = subprocess.Popen(command, env=environment, cwd=directory, stdout=subprocess.DEVNULL)
    try:
        while not is_ready(base, ready_path):
            if server.poll() is not None or time.perf_counter() - begin > READY_TIMEOUT_S:
                sys.exit(f"{' '.join(command)} did not become ready")
            time.sleep(POLL_S)
        yield base, time.perf_counter() - begin
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ends a server as Ctrl-C does; kills it if it takes too long."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextmanager
def ray_cluster(environment: Mapping[str, str]) -> Iterator[str]:
    """Runs a Ray cluster of one node on loopback until the context ends. Yields its address."""
    command = [sys.executable, str(ROOT / "cluster" / "local_nodes.py"), "1", "--no-dashboard"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as nodes:
        assert nodes.stdout is not None
        try:
            for line in nodes.stdout:
                if "RAY_ADDRESS=" in line:
                    yield line.partition("RAY_ADDRESS=")[2].strip()
                    return
            sys.exit("Ray did not start")
        finally:
            nodes.send_signal(signal.SIGINT)
            nodes.communicate(timeout=STOP_TIMEOUT_S)


def serve_command(model: str, settings: Mapping[str, Any], port: int) -> list[str]:
    """The command of `gptj-dist serve`; `settings` are its options by name."""
    return [sys.executable, "-m", "gptj_dist", "serve", model, "--port", str(port), *_options(settings)]


def vllm_serve_command(
    python: str, model: str, settings: Mapping[str, Any], port: int
) -> tuple[list[str], dict[str, str]]:
    """The command of vLLM's server, and variables for its environment; `settings` are those of `split_settings`."""
    environment, arguments = split_settings(settings)
    # The module, as `vllm serve` fails with the CPU build: it looks its version up under another package name.
    command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    return [*command, "--port", str(port), "--disable-uvicorn-access-log", *_options(arguments)], environment


def is_ready(base: str, path: str = "/ready") -> bool:
    """Whether the server answers the path with status 200."""
    try:
        with urllib.request.urlopen(base + path, timeout=10) as response:
            return bool(response.status == 200)
    except (OSError, HTTPException):
        return False


def free_port() -> int:
    """A free port of 127.0.0.1 for a server that is about to start.

    It is none of those that the system gives to programs that ask for any: one of Ray's many would be given it before
    the server listens.
    """
    first_given, last_given = map(int, GIVEN_PORTS.read_text().split())
    ports = [port for port in range(FIRST_PORT, 2**16) if not first_given <= port <= last_given]
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.choice(ports))) as listener:
            port: int = listener.getsockname()[1]
            return port


def _options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options: `--max-model-len 2048`, a true one `--enable-x`, a false one `--no-enable-x`."""
    options = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        options += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return options
