"""Clusters of machines that are network namespaces: formed by `gptj-dist up` and `join` alone, and what they serve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.namespaces import Network
from benchmarks.servers import READY_TIMEOUT_S, is_ready, stop

START_LIMIT_S = 300.0
PORT = 8000
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster, and a server in it.

    Args:
        logs: directory for what the processes print.
        address: of the cluster.
        joined: the process of `gptj-dist join` of each machine but the first.
    """

    net: Network
    environment: Mapping[str, str]
    logs: Path
    address: str
    joined: Mapping[int, subprocess.Popen[bytes]]

    @property
    def base(self) -> str:
        """URL of the server."""
        return f"http://{self.net.address(1)}:{PORT}"

    def serve(self, model: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
        """Serves from the first machine. Returns when the server is ready."""
        command = ["serve", model, *options, "--insecure", "--address", self.address]
        command += ["--host", self.net.address(1), "--port", str(PORT)]
        process = _start(self.net, 1, command, self.environment, self.logs / "serve")
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not is_ready(self.base):
            if process.poll() is not None or time.monotonic() > deadline_s:
                stop(process)
                sys.exit(f"the server did not become ready:\n{(self.logs / 'serve').read_text()}")
            time.sleep(POLL_S)
        return process

    def nodes(self) -> Any:
        """What `gptj-dist nodes --json` shows."""
        return json.loads(self.gptj_dist(1, "nodes", "--json", "--address", self.address))

    def gptj_dist(self, machine: int, *arguments: str) -> str:
        """What a command prints that is run on a machine."""
        command = self.net.command(machine, [sys.executable, "-m", "gptj_dist", *arguments])
        return subprocess.run(command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def form_cluster(net: Network, environment: Mapping[str, str], logs: Path, cpus: int) -> Site:
    """`up` on the first machine, `join` on the others."""
    head = _start(net, 1, ["up", "--cpus", str(cpus)], environment, logs / "up")
    code = _wait_for(head, logs / "up", r"gptj-dist join (\S+)")
    joined = {
        number: _start(net, number, ["join", code, "--cpus", str(cpus)], environment, logs / f"join{number}")
        for number in net.machines[1:]
    }
    for number, process in joined.items():
        _wait_for(process, logs / f"join{number}", "Ctrl-C leaves")
        print((logs / f"join{number}").read_text().strip(), file=sys.stderr)
    return Site(net, environment, logs, _wait_for(head, logs / "up", r"head at (\S+)"), joined)


def _start(
    net: Network, number: int, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    command = net.command(number, [sys.executable, "-m", "gptj_dist", *arguments])
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _wait_for(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    deadline_s = time.monotonic() + START_LIMIT_S
    while (found := re.search(pattern, log.read_text())) is None:
        if process.poll() is not None or time.monotonic() > deadline_s:
            sys.exit(f"it did not say {pattern!r}:\n{log.read_text()}")
        time.sleep(POLL_S)
    return found[found.lastindex or 0]
