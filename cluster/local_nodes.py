"""Starts several Ray nodes on this one machine, to try out what is meant for several machines. Loopback only.

    python cluster/local_nodes.py 2

The nodes are real ones (a raylet, an object store and an agent each), so Serve, placement groups and stages behave as
on N machines; only the resources are logical: N nodes share the cores, and `--gpus-per-node` counts GPUs that nobody
looks for. Ctrl-C or SIGTERM ends these nodes and nothing else (`ray stop` would end every Ray of this machine); if this
process is killed, the nodes end, too.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gptj_dist.stages.cores import available_cores

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 100_000_000  # a node's; the stages' tensors do not go through it


def main() -> None:
    """Starts the nodes, tells where, and waits to be interrupted."""
    args = parse_args()
    # Before Ray is imported: it listens on all interfaces unless it takes the machine for a desktop.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="ray-nodes-", dir="/tmp") as directory:  # short: Ray puts sockets there
        # In Ray's usual place it would note these nodes as "the" cluster, which whoever names none then joins.
        os.environ["RAY_TMPDIR"] = directory
        try:
            with running_nodes(args) as cluster:
                announce(args.nodes, cluster, directory)
                signal.pause()
        except KeyboardInterrupt:
            print("Stopped.")


@contextmanager
def running_nodes(args: argparse.Namespace) -> Iterator[Any]:
    """The nodes, as Ray's own tests start them; their processes end with the context."""
    from ray.cluster_utils import Cluster

    catch_signals()
    cluster = Cluster()
    try:
        cluster.add_node(**head_options(args))
        for _ in range(args.nodes - 1):
            cluster.add_node(**node_options(args))
        catch_signals()  # again: Ray has put its own handler of SIGTERM there
        yield cluster
    finally:
        cluster.shutdown()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start several Ray nodes on this machine, on loopback, until Ctrl-C.")
    parser.add_argument("nodes", type=int, metavar="N", help="number of nodes, the head included")
    parser.add_argument("--cpus-per-node", type=int, help="default: this machine's cores, shared; at least 1")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="default: 0")
    parser.add_argument("--no-dashboard", action="store_true", help="without it `serve deploy` has nobody to talk to")
    args = parser.parse_args()
    if args.nodes < 1:
        parser.error(f"N must be at least 1, got {args.nodes}")
    if args.cpus_per_node is None:
        args.cpus_per_node = max(1, available_cores() // args.nodes)
    return args


def node_options(args: argparse.Namespace) -> dict[str, Any]:
    """What each node gets."""
    return {
        "node_ip_address": LOOPBACK,
        "num_cpus": args.cpus_per_node,
        "num_gpus": args.gpus_per_node,
        "object_store_memory": OBJECT_STORE_BYTES,
    }


def head_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the head gets on top: a dashboard, at a free port, as another Ray's may have the usual one."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
    return node_options(args) | {
        "include_dashboard": not args.no_dashboard,
        "dashboard_host": LOOPBACK,
        "dashboard_port": port,
    }


def announce(num_nodes: int, cluster: Any, directory: str) -> None:
    """Prints what to give to whom."""
    print(f"{num_nodes} Ray nodes at {cluster.address}, logs in {directory} until they stop\n")
    # Without the first line Ray takes 127.0.0.1 for this machine's address on the network, where no node listens.
    print("  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0")
    print(f"  export RAY_ADDRESS={cluster.address}")
    if cluster.webui_url:
        print(f"  export RAY_DASHBOARD_ADDRESS=http://{cluster.webui_url}")
    print(f"  gptj-dist serve demo --stages {num_nodes}")
    print("\nCtrl-C stops them.", flush=True)


def catch_signals() -> None:
    """Makes the first SIGINT or SIGTERM a `KeyboardInterrupt`; later ones must not keep the nodes from being ended."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


if __name__ == "__main__":
    main()
