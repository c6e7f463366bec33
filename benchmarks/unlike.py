"""Compares the planner's cut with the even one, over two nodes of which one is held to a part of a core.

    python -m benchmarks.unlike /work/models/deep                       one node at half speed, four servers in turn
    python -m benchmarks.unlike MODEL --share 0.25 --rounds 1

Starts two Ray nodes on this machine, each bound to a core of its own; the second is in a control group whose CPU quota
is `--share` of a core. Needs root, and control groups that can be written (version 1 or 2). Then it serves the model
with `--plan auto`, and with as many layers in each stage as the planner gives equal devices, on the same nodes in the
same order: A B A B. Each server gets the assumed traffic: closed loops of `--streams` clients, 128 prompt tokens and 32
output tokens a request. The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import Case
from benchmarks.figures import machine, print_document, print_row
from benchmarks.load import Target, closed_loop, failures, serving_figures
from benchmarks.nodes import read_until_up
from benchmarks.processes import Family, content, parent
from benchmarks.servers import READY_TIMEOUT_S, ROOT, STOP_TIMEOUT_S, free_port, is_ready, serve_command, stop

PERIOD_US = 100_000
POLL_S = 0.2
PATIENCE = {"RAY_raylet_start_wait_time_s": "240", "RAY_agent_register_timeout_ms": "240000"}
"""For Ray's nodes, on a busy machine."""
GROUP = "gptj-dist-unlike"
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
TOKENS = (128, 32)
"""In and out, of a request: the mix that the planner assumes."""


def main() -> None:
    args = _parser().parse_args()
    family = Family()
    runs: dict[str, list[dict[str, Any]]] = {"planned": [], "even": []}
    port = free_port()  # Serve's proxies stay between servers, and keep theirs
    with _nodes(family, args.share) as environment:
        order: Sequence[str] = ()
        for _ in range(args.rounds):
            planned = _run(args, port, environment, ["--plan", "auto", "--stages", "2"])
            runs["planned"].append(planned)
            order = planned["machines"] or order
            places = ",".join(f"machine={number}" for number in order)
            runs["even"].append(_run(args, port, environment, ["--stages", "2", "--stage-nodes", places]))
            print_row([name for kind in runs for name in (kind, round(runs[kind][-1]["tokens_per_s"], 1))])
    rates = {kind: median(run["tokens_per_s"] for run in found) for kind, found in runs.items()}
    document = {"machine": machine(), "model": args.model, "share": args.share, "streams": args.streams, "runs": runs}
    print_document("unlike", document | {"planned_against_even": rates["planned"] / rates["even"]})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=0.5, help="of a core, for the second node")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96, help="of each server")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    return parser


def _run(args: argparse.Namespace, port: int, environment: Mapping[str, str], options: Sequence[str]) -> dict[str, Any]:
    """Serves with these options, and measures. `machines` are those that a plan has named, stage by stage."""
    settings = {"served_model_name": args.model, "device": "cpu", "dtype": args.dtype, "max_model_len": 1024}
    command = [*serve_command(args.model, settings, port), "--no-speculation", "--no-prefix-cache", *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = []
        try:
            for line in server.stdout:
                said.append(line.rstrip())
                print(f"  {said[-1]}", file=sys.stderr)
                if "Ctrl-C stops" in line:
                    break
            base = f"http://127.0.0.1:{port}"
            _wait_for_proxies(server, base)
            case, target = Case(args.streams, *TOKENS), Target(base, args.model)
            warm = asyncio.run(closed_loop(target, case, args.streams, seed=1))
            measured = asyncio.run(closed_loop(target, case, args.requests, seed=2))
            if failures(measured) or failures(warm):
                sys.exit(f"requests failed: {failures(measured) or failures(warm)}")
        finally:
            stop(server)  # type: ignore[arg-type]
    figures = serving_figures(measured, {})
    found = [re.search(r"^stage \d+: (\d+) layers? on .*machine=(\d+)", line) for line in said]
    return {
        "tokens_per_s": figures["output_throughput"],
        "layers": [int(match[1]) for match in found if match],
        "machines": [match[2] for match in found if match],
        "said": [line for line in said if line.startswith(("Planned", "stage ", "left out"))],
    }


def _wait_for_proxies(server: subprocess.Popen[str], base: str) -> None:
    """Each node has a proxy, both at one port here; a connection lands on one or another."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not all(is_ready(base) for _ in range(8)):
        if server.poll() is not None or time.monotonic() > deadline_s:
            sys.exit("the server did not become ready")
        time.sleep(POLL_S)


@contextmanager
def _nodes(family: Family, share: float) -> Iterator[dict[str, str]]:
    """Two nodes, each with its core, the second one held back. Yields the environment of a program that joins them."""
    command = [sys.executable, str(ROOT / "cluster" / "local_nodes.py"), "2", "--cpus-per-node", "4", "--no-dashboard"]
    with (
        _quota(share) as group,
        subprocess.Popen(command, env=family.environment | PATIENCE, stdout=subprocess.PIPE, text=True) as nodes,
    ):
        said = read_until_up(nodes)
        try:
            raylets = sorted((int(p.name) for p in family.members() if _is_raylet(p)), key=_node_number)
            cores = sorted(os.sched_getaffinity(0))
            for raylet, core in zip(raylets, cores, strict=False):
                for pid in _with_descendants(family, raylet):
                    with suppress(OSError):
                        subprocess.run(["taskset", "-acp", str(core), str(pid)], check=False, capture_output=True)
            for pid in _with_descendants(family, raylets[1]):
                with suppress(OSError):
                    (group / "cgroup.procs").write_text(str(pid))
            yield {**family.environment, **dict(re.findall(r"export (\w+)=(\S+)", said))}
        finally:
            nodes.send_signal(signal.SIGINT)
            nodes.communicate(timeout=STOP_TIMEOUT_S)


def _is_raylet(process: Path) -> bool:
    return content(process / "cmdline").split(b"\0")[0].endswith(b"/raylet/raylet")


def _node_number(pid: int) -> str:
    """The value of the label that `cluster/local_nodes.py` gives a node."""
    found = re.search(r"machine\W+(\d+)", content(Path(f"/proc/{pid}/cmdline")).decode(errors="replace"))
    if found is None:
        sys.exit("a node has no label")
    return found[1]


def _with_descendants(family: Family, root: int) -> list[int]:
    found = {str(root)}
    parents = {process.name: parent(process) for process in family.members()}
    while more := {name for name, of in parents.items() if of in found} - found:
        found |= more
    return [int(name) for name in found]


@contextmanager
def _quota(share: float) -> Iterator[Path]:
    """A control group whose processes together may use a part of a core."""
    is_v1 = (V1 / "cpu.cfs_quota_us").exists() or (V1 / "cpu.shares").exists()
    group = (V1 if is_v1 else V2) / GROUP
    try:
        group.mkdir(exist_ok=True)
        if is_v1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(round(share * PERIOD_US)))
        else:
            (group / "cpu.max").write_text(f"{round(share * PERIOD_US)} {PERIOD_US}")
    except OSError as error:
        sys.exit(f"control groups cannot be written here: {error}")
    try:
        yield group
    finally:
        with suppress(OSError):  # a process that has not ended yet keeps it
            group.rmdir()


if __name__ == "__main__":
    main()
