"""Waits until the server can generate a token, and shows the progress of the stages meanwhile."""

from __future__ import annotations

import json
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress

from gptj_dist.errors import StageFailedError
from gptj_dist.operate.launch.application import failure_of, within
from gptj_dist.operate.launch.settings import Launch
from gptj_dist.operate.launch.start_display import StartDisplay
from gptj_dist.stages.load_progress import LoadProgress

POLL_S = 0.05
PROGRESS_S = 0.5
PROBE_TIMEOUT_S = 10.0
RAY_TIMEOUT_S = 60.0
"""A machine that loads a large model may keep Ray waiting."""


def await_ready(
    launch: Launch, base: str, stop: threading.Event, lost_process: Callable[[], str | None], display: StartDisplay
) -> bool:
    """Waits until the server is ready. Returns whether it is: false if `stop` came first.

    Args:
        base: URL of the server.
        lost_process: gives the name of a process of Ray's own that has ended.

    Raises:
        ConfigurationError, StageFailedError: the application cannot start, or Ray has died.
        RayGoneError: Ray does not answer.
    """
    next_progress_s = 0.0
    while not is_ready(base, launch.api_key):
        if time.monotonic() >= next_progress_s:
            next_progress_s = time.monotonic() + PROGRESS_S
            if (process := lost_process()) is not None:
                raise StageFailedError(f"Ray's process {process} has ended")
            failure, stages = within(RAY_TIMEOUT_S, lambda: (failure_of(launch.name), _progress(launch.name)))
            if failure is not None:
                raise failure
            display.show("Loading the model" if stages else "Placing the stages", stages)
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


def _progress(name: str) -> dict[str, LoadProgress]:
    """How far the stages are that have a process: by `stage-0`, or by `1/stage-0` where there are several pipelines."""
    import ray

    from gptj_dist.stages.actor_classes import ACTOR_NAME_PREFIX

    named = ray.util.list_named_actors(all_namespaces=True)
    actors = [a for a in named if a["name"].startswith(ACTOR_NAME_PREFIX) and f"::{name}#" in a["name"]]
    pipelines = sorted({_pipeline_of(actor["name"]) for actor in actors})
    stages = {}
    for actor in sorted(actors, key=lambda a: str(a["name"])):
        stage = actor["name"].rpartition("/")[2]
        label = stage if len(pipelines) == 1 else f"{pipelines.index(_pipeline_of(actor['name'])) + 1}/{stage}"
        with suppress(ray.exceptions.RayError, ValueError):
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            stages[label] = ray.get(handle.progress.remote(), timeout=PROGRESS_S)
    return stages


def _pipeline_of(actor_name: str) -> str:
    """What stands before epoch and stage."""
    return actor_name.rsplit("/", 2)[0]
