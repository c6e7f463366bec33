"""Measures how long a server without a pipeline takes to its first token, and what happens under a burst.

    python -m benchmarks.wake demo                          the seconds from a request to its first token, three times
    python -m benchmarks.wake demo --burst 16 --serve-args="--stages 2 --max-batch-size 4 --cpus-per-stage 0.25"
                                                            16 clients wake it until three pipelines run

The server runs with `--min-replicas 0` and sleeps before each round. `first_token_s` is the time of each round. The
parts of each round are read from the logs of Ray Serve, the coordinator and the stages: `decide_s` until Serve starts a
pipeline, `process_s` until its coordinator's process has imported its modules, `stages_s` until the last stage's
process has, `load_s` until the last stage has read its weights and has its cache, `prove_s` until a token was made,
`answer_s` until the client has its first token. `cpu_s` is the computing time of all processes of the server in the
round, without those that ended: on busy machines it says more than the clock. With `--burst` the clients go on until
all pipelines run, for five minutes at most, and then the server sleeps again: they must need so many, and the machine
have room for them. `failed` counts answers other than 200. The last line on standard output is one JSON document. Linux
only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.figures import machine, print_document
from benchmarks.processes import Family, content, cpu_s
from benchmarks.servers import started

SLEEP_TIMEOUT_S, BURST_TIMEOUT_S = 300.0, 300.0
POLL_S = 0.1
BODY = {"prompt": "Call me", "max_tokens": 16, "stream": True, "ignore_eos": True}
LONG = {"prompt": "My fellow citizens", "max_tokens": 64, "ignore_eos": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--serve-args", default="--stages 2", help="arguments of gptj-dist serve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle-s", type=float, default=10.0, help="as for gptj-dist serve")
    parser.add_argument("--burst", type=int, default=0, help="clients that wake it together, after the rounds")
    parser.add_argument("--pipelines", type=int, default=3, help="the most")
    args = parser.parse_args()
    sleepy = ["--min-replicas", "0", "--max-replicas", str(args.pipelines), "--idle-s", str(args.idle_s)]
    family = Family()
    with started(args.model, [*args.serve_args.split(), *sleepy], family.environment) as (base, ready_s):
        rounds = [wake(base, args.model, family) for _ in range(args.rounds)]
        figures: dict[str, Any] = {"ready_s": ready_s, "rounds": rounds}
        if rounds:
            figures["first_token_s"] = statistics.median(one["first_token_s"] for one in rounds)
        if args.burst:
            figures["burst"] = asyncio.run(burst(base, args.model, args.burst, args.pipelines))
            figures["burst"]["asleep_again_s"] = wait_until(lambda: is_asleep(base), "sleeps again", SLEEP_TIMEOUT_S)
    print_document("wake", {"machine": machine(), **vars(args), **figures})


def wake(base: str, model: str, family: Family) -> dict[str, float]:
    """Waits until the server sleeps, and sends a request. The seconds until the first token, and their parts."""
    wait_until(lambda: is_asleep(base), "sleeps", SLEEP_TIMEOUT_S)
    before, began_at = _cpu_s(family), time.time()
    with (
        httpx.Client(base_url=base, timeout=SLEEP_TIMEOUT_S) as client,
        client.stream("POST", "/v1/completions", json={"model": model, **BODY}) as response,
    ):
        lines = response.iter_lines()
        next(line for line in lines if line)
        first_at = time.time()
        if response.status_code != 200:
            sys.exit(f"the request failed: {response.status_code}")
        for _ in lines:
            pass
    cpu_s = sum(seconds - before.get(process, 0.0) for process, seconds in _cpu_s(family).items())
    figures = {"first_token_s": first_at - began_at, "cpu_s": cpu_s, **_parts(family, began_at, first_at)}
    wait_until(lambda: not is_asleep(base), "knows that it is awake", SLEEP_TIMEOUT_S)
    print(" ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
    return figures


async def burst(base: str, model: str, num_clients: int, num_pipelines: int) -> dict[str, Any]:
    """Clients that send one request after the other until all pipelines run."""
    statuses: list[int] = []
    most, began_s, is_over = 0, time.monotonic(), asyncio.Event()

    async def client(http: httpx.AsyncClient) -> None:
        while not is_over.is_set():
            statuses.append((await http.post("/v1/completions", json={"model": model, **LONG})).status_code)

    limits = httpx.Limits(max_connections=num_clients + 2)
    async with (
        httpx.AsyncClient(base_url=base, timeout=BURST_TIMEOUT_S, limits=limits) as http,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(num_clients):
            group.create_task(client(http))
        while most < num_pipelines and time.monotonic() - began_s < BURST_TIMEOUT_S:
            await asyncio.sleep(POLL_S)
            most = max(most, len((await http.get("/debug/pipeline")).json()["pipelines"]))
        all_s = time.monotonic() - began_s
        is_over.set()
    failed = sum(status != 200 for status in statuses)
    return {"most": most, "all_pipelines_s": all_s, "answers": len(statuses), "failed": failed}


def is_asleep(base: str) -> bool:
    """Whether the server has no pipeline because it needs none."""
    with urllib.request.urlopen(base + "/ready", timeout=30) as response:
        return bool(json.load(response)["status"] == "asleep")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> float:
    """Returns the seconds until the condition is true."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > timeout_s:
            sys.exit(f"gave up after {timeout_s:.0f} s waiting until the server {what}")
        time.sleep(POLL_S)
    return time.monotonic() - began_s


def _cpu_s(family: Family) -> dict[str, float]:
    """Computing time of each process that lives, by its id."""
    return {process.name: cpu_s(process) for process in family.members()}


def _parts(family: Family, began_at: float, first_at: float) -> dict[str, float]:
    """Of the time until the first token, by the logs; none where they do not tell."""
    if (session := _session(family)) is None:
        return {}
    logs = session / "logs"
    coordinators, stages = list(logs.glob("gptj-dist/coordinator-*")), list(logs.glob("gptj-dist/stage-*"))
    times = {
        "decide_s": _times(logs.glob("serve/controller_*.log"), "Upscaling Deployment(name='Pipeline'", began_at)[:1],
        "process_s": _times(coordinators, "pipeline starts", began_at)[:1],
        "stages_s": _times(stages, "stage loads", began_at)[-1:],
        "load_s": _times(stages, "stage ready", began_at)[-1:],
        "prove_s": _times(coordinators, "pipeline up", began_at)[:1],
        "answer_s": [first_at],
    }
    if not all(times.values()):
        return {}
    ends = [began_at, *(at for [at] in times.values())]
    return {name: after - before for name, (before, after) in zip(times, pairwise(ends), strict=True)}


def _session(family: Family) -> Path | None:
    """The directory of the server's Ray, which the command lines of Ray's processes name."""
    found = (_SESSION.search(content(path / "cmdline").decode(errors="replace")) for path in family.members())
    return next((Path(one[0]) for one in found if one is not None), None)


_SESSION = re.compile(r"/[^\0= ]*/session_\d[\d_-]*")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,]\d{3}Z?")


def _times(files: Iterable[Path], text: str, since: float) -> list[float]:
    """When lines with this text were logged, in order."""
    times = []
    for file in files:
        for line in file.read_text(errors="replace").splitlines():
            found = _TIME.search(line)
            if found is not None and text in line:
                times.append(datetime.fromisoformat(found[0].replace(",", ".")).timestamp())
    return sorted(at for at in times if at >= since)


if __name__ == "__main__":
    main()
