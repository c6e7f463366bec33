"""Which alerts fire, and when, if parts of a served demo die: a Prometheus scrapes it and evaluates our rules.

    python -m benchmarks.alerts                    a stage once, a stage again and again, the server
    python -m benchmarks.alerts stage

Starts `gptj-dist serve demo --stages 2` and Prometheus (Debian's package `prometheus`) with `cluster/monitoring/`, but
scrapes every 2 s. First nothing is done to the server, and no alert may fire. Then it kills the part with SIGKILL and
waits for the alert. The last line on standard output is one JSON document. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.figures import machine, print_document, print_row
from benchmarks.parts import PARTS, title
from benchmarks.processes import Family
from benchmarks.servers import ROOT, free_port, is_ready, serve_command, stop

MONITORING = ROOT / "cluster" / "monitoring"
ALERTS = {"stage": "GptjStageLost", "stages": "GptjStagesKeepDying", "server": "GptjUnreachable"}
"""What is killed, and the alert that says so."""
NUM_LOSSES = {"stages": 4}
SCRAPE_S = 2
START_LIMIT_S = 300.0
FIRING_LIMIT_S = 180.0
POLL_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(ALERTS)}; default: all")
    parser.add_argument("--quiet-s", type=float, default=30.0, help="seconds in which no alert may fire; default 30")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(ALERTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    if shutil.which("prometheus") is None:
        sys.exit("prometheus is not installed (Debian's package `prometheus`)")
    print_row(["killed", "alert", "after s", "firing before"])
    documents = []
    for part in args.parts or list(ALERTS):
        documents.append(tried(part, args.quiet_s))
        print_row(documents[-1].values())
    print_document("alerts", {"machine": machine(), "parts": documents})


def tried(part: str, quiet_s: float) -> dict[str, Any]:
    """Serves the demo, leaves it alone, kills the part, and waits for its alert.

    Returns:
        The part, the alert, the seconds until it fired (None: it did not), and what fired before anything was killed.
    """
    family, port = Family(), free_port()
    base, command = f"http://127.0.0.1:{port}", serve_command("demo", {"stages": 2}, port)
    server = subprocess.Popen(command, env=family.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_ready(base, server)
        with prometheus(port) as monitor:
            time.sleep(quiet_s)
            before = firing(monitor)
            begin_s = time.monotonic()
            for _ in range(NUM_LOSSES.get(part, 1)):
                _kill(part, family, server)
                if part == "stages":
                    time.sleep(2 * SCRAPE_S)  # each loss must be seen by a scrape of its own
                    _wait_until_ready(base, server)
            after_s = _seconds_until(ALERTS[part], monitor, begin_s)
        return {"part": part, "alert": ALERTS[part], "after_s": after_s, "firing_before": before}
    finally:
        stop(server)
        family.kill()


@contextmanager
def prometheus(target_port: int) -> Iterator[str]:
    """Runs a Prometheus that scrapes the port until the context ends. Yields its URL."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        for path in MONITORING.glob("*.yml"):
            text = path.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{target_port}")
            (Path(directory) / path.name).write_text(text.replace(": 15s", f": {SCRAPE_S}s"))
        command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        monitor = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            monitor.terminate()
            monitor.wait()


def firing(monitor: str) -> list[str]:
    """The names of the alerts that fire."""
    with urllib.request.urlopen(f"{monitor}/api/v1/alerts", timeout=10) as response:
        alerts = json.load(response)["data"]["alerts"]
    return sorted({alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"})


def _kill(part: str, family: Family, server: subprocess.Popen[bytes]) -> None:
    if part == "server":
        server.kill()
        family.kill()
        return
    [victim, *_] = [int(process.name) for process in family.members() if PARTS["stage"] in title(process)]
    os.kill(victim, signal.SIGKILL)


def _wait_until_ready(base: str, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while not is_ready(base):
        if server.poll() is not None or time.monotonic() > deadline_s:
            sys.exit("the server did not become ready")
        time.sleep(POLL_S)


def _seconds_until(alert: str, monitor: str, begin_s: float) -> float | None:
    while time.monotonic() - begin_s < FIRING_LIMIT_S:
        if alert in firing(monitor):
            return time.monotonic() - begin_s
        time.sleep(POLL_S)
    return None


if __name__ == "__main__":
    main()
