"""Takes a node of a cluster away, or its GCS, while a stream runs, and says what becomes of the stream.

    python -m benchmarks.nodes                  both
    python -m benchmarks.nodes node

Starts six Ray nodes on this machine (`cluster/local_nodes.py`), each with room for one stage, and on them `gptj-dist
serve demo --stages 2 --dtype float32`. When a stream has 20 tokens, it kills

- `node`: all processes of a node that has a stage, and neither the coordinator nor another part of Serve;
- `gcs`: Ray's GCS, and starts it again after 3 s, as Kubernetes would. The GCS keeps its state in a Redis that is
  started for it, so `redis-server` must be installed.

The stream is compared with the same stream undisturbed; then one more request must be served. The last line on
standard output is one JSON document. Linux only.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.parts import PARTS, report, title, tried
from benchmarks.processes import Family, content, parent
from benchmarks.servers import ROOT, STOP_TIMEOUT_S, free_port

NUM_NODES = 6
MAX_TOKENS = 640
"""Output tokens of the streams: they run longer than the GCS is away."""

GCS_AWAY_S = 3.0
AFTERMATH_S = 70.0
"""Nodes that do not find the GCS end after 60 s."""

SETTINGS = {"stages": 2, "device": "cpu", "dtype": "float32", "cpus_per_stage": 1}


def main() -> None:
    assert __doc__ is not None
    report("nodes", __doc__, {"node": loss_of_a_node, "gcs": loss_of_the_gcs})


def loss_of_a_node() -> dict[str, Any]:
    """Kills a node that has a stage; reports as `benchmarks.parts.tried` does."""
    family = Family()
    return _tried("node", family, family.environment, lambda: _kill_node(family))


def loss_of_the_gcs() -> dict[str, Any]:
    """Kills the GCS and starts it again; reports as `benchmarks.parts.tried` does."""
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("redis-server is not installed: apt install redis-server")
    family, port = Family(), free_port()
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    # Without a fixed port the new GCS would listen on another one, where no node looks for it.
    settings = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}", "RAY_GCS_SERVER_PORT": str(free_port())}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as redis:
        try:
            return _tried("gcs", family, {**family.environment, **settings}, lambda: _restart_gcs(family))
        finally:
            redis.terminate()


def _tried(part: str, family: Family, environment: Mapping[str, str], harm: Callable[[], None]) -> dict[str, Any]:
    with _nodes(environment) as joined:
        return tried(part, family, SETTINGS, joined, harm, MAX_TOKENS, AFTERMATH_S)


def read_until_up(nodes: subprocess.Popen[str]) -> str:
    """What `cluster/local_nodes.py` prints until its nodes run. Ends this program if they do not start."""
    assert nodes.stdout is not None
    said = ""
    for line in nodes.stdout:
        said += line
        if "Ctrl-C stops them." in line:
            return said
    sys.exit("Ray's nodes did not start")


@contextmanager
def _nodes(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Runs nodes until the context ends. Yields the environment of a program that joins them."""
    command = [sys.executable, str(ROOT / "cluster" / "local_nodes.py"), str(NUM_NODES), "--cpus-per-node", "1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as nodes:
        said = read_until_up(nodes)
        try:
            yield {**environment, **dict(re.findall(r"export (\w+)=(\S+)", said))}
        finally:
            nodes.send_signal(signal.SIGINT)
            nodes.communicate(timeout=STOP_TIMEOUT_S)


def _kill_node(family: Family) -> None:
    members = family.members()
    node_of = {process: parent(process) for process in members}
    needed = {node for process, node in node_of.items() if title(process).startswith("ray::Serve")}
    victims = [node for process, node in node_of.items() if ":stage-" in title(process) and node not in needed]
    if not victims:
        sys.exit("every node with a stage has a part of Serve, too; try again")
    for process, node in node_of.items():
        if victims[0] in (process.name, node):
            os.kill(int(process.name), signal.SIGKILL)


def _restart_gcs(family: Family) -> None:
    [gcs] = [process for process in family.members() if PARTS["gcs"] in title(process)]
    command = _strings(gcs / "cmdline")
    environment = dict(string.split("=", 1) for string in _strings(gcs / "environ") if "=" in string)
    os.kill(int(gcs.name), signal.SIGKILL)
    time.sleep(GCS_AWAY_S)
    subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _strings(path: Path) -> list[str]:
    """The strings of a file in /proc that ends each with a zero byte; some may be empty."""
    return [string.decode() for string in content(path).split(b"\0")[:-1]]


if __name__ == "__main__":
    main()
