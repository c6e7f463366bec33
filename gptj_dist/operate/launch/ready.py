"""Waits until the server can generate a token, and shows the progress of the stages meanwhile."""

from __future__ import annotations

import json
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console

from gptj_dist.errors import StageFailedError
from gptj_dist.operate.launch.application import failure_of, within
from gptj_dist.operate.launch.settings import Launch

POLL_S = 0.05
PROGRESS_S = 0.5
PROBE_TIMEOUT_S = 10.0
RAY_TIMEOUT_S = 60.0
"""A machine that loads a large model may keep Ray waiting."""


def await_ready(
    launch: Launch, base: str, stop: threading.Event, lost_process: Callable[[], str | None], console: Console
) -> bool:
    """Waits until the server is ready. Returns whether it is: false if `stop` came first.

    Args:
        base: URL of the server.
        lost_process: gives the name of a process of Ray's own that has ended.

    Raises:
        ConfigurationError, StageFailedError: the application cannot start, or Ray has died.
        RayGoneError: Ray does not answer.
    """
    shown, next_progress_s = "", 0.0
    with console.status("Starting Serve ...") as status:
        while not is_ready(base, launch.api_key):
            if time.monotonic() >= next_progress_s:
                next_progress_s = time.monotonic() + PROGRESS_S
                if (process := lost_process()) is not None:
                    raise StageFailedError(f"Ray's process {process} has ended")
                failure, progress = within(RAY_TIMEOUT_S, lambda: (failure_of(launch.name), _progress(launch.name)))
                if failure is not None:
                    raise failure
                status.update(progress)
                if progress != shown and not console.is_terminal:
                    console.print(progress)
                shown = progress
            if stop.wait(POLL_S):
                return False
    return True


def is_ready(base: str, api_key: str | None) -> bool:
    """Whether the server says that it can make a token. It is this machine's, so no proxy is asked."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    # The certificate is for the name that others call the machine by; here it is the server that was just started.
    context = ssl._create_unverified_context()  # nosec B323
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(urllib.request.Request(f"{base}/ready", headers=headers), timeout=PROBE_TIMEOUT_S) as response:
            return bool(json.load(response)["status"] == "ready")
    except (OSError, ValueError):
        return False


def _progress(name: str) -> str:
    """`Loading the model (stage-0: 9/14 layers, stage-1: fetching model.safetensors) ...`."""
    import ray

    from gptj_dist.stages.group import ACTOR_NAME_PREFIX

    named = ray.util.list_named_actors(all_namespaces=True)
    actors = [a for a in named if a["name"].startswith(ACTOR_NAME_PREFIX) and f"::{name}#" in a["name"]]
    parts = []
    for actor in sorted(actors, key=lambda a: str(a["name"])):
        with suppress(ray.exceptions.RayError, ValueError):
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            progress = ray.get(handle.progress.remote(), timeout=PROGRESS_S)
            parts.append(f"{actor['name'].rpartition('/')[2]}: {progress}")
    return f"Loading the model ({', '.join(parts)}) ..." if parts else "Placing the stages ..."
