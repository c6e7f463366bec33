"""Servers as processes of their own, started for a measurement and ended behind it: ours and vLLM's. Stdlib only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.vllm_settings import split_settings

ROOT = Path(__file__).parent.parent
READY_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30
POLL_S = 0.02


@contextmanager
def started(
    model: str, serve_args: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, float]]:
    """`gptj-dist serve` as a process of its own; gives its URL and the seconds from the command to ready.

    Clients call the model as it is called here, path or not.
    """
    port = free_port()
    command = [*serve_command(model, {"served_model_name": model}, port), *serve_args]
    with running(command, environment or os.environ, port, "/ready") as ready:
        yield ready


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], port: int, ready_path: str, directory: Path | None = None
) -> Iterator[tuple[str, float]]:
    """A server's command, from when it is ready until the context ends; gives its URL and the seconds it took."""
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
        server.send_signal(signal.SIGINT)
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextmanager
def ray_cluster(environment: Mapping[str, str]) -> Iterator[str]:
    """A Ray cluster of one node on loopback; gives its address."""
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
    """`gptj-dist serve` with its options by name."""
    return [sys.executable, "-m", "gptj_dist", "serve", model, "--port", str(port), *_options(settings)]


def vllm_serve_command(
    python: str, model: str, settings: Mapping[str, Any], port: int
) -> tuple[list[str], dict[str, str]]:
    """vLLM's server with settings as `split_settings` takes them; and what its environment needs."""
    environment, arguments = split_settings(settings)
    # `vllm serve` asks for its version by a name that its CPU build is not installed under; the module does not.
    command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    return [*command, "--port", str(port), "--disable-uvicorn-access-log", *_options(arguments)], environment


def is_ready(base: str, path: str = "/ready") -> bool:
    """Whether a token can be made."""
    try:
        with urllib.request.urlopen(base + path, timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _options(settings: Mapping[str, Any]) -> list[str]:
    """`--max-model-len 2048`, or of a switch `--enable-prefix-caching` and `--no-enable-prefix-caching`."""
    options = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        options += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return options
