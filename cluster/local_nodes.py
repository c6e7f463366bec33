"""Starts several Ray nodes on this machine, to try what is meant for several machines. Loopback only.

    python cluster/local_nodes.py 2

Each node is a real one, with a raylet, an object store and an agent, so Serve, placement groups and stages behave as on
N machines. Only the resources are logical: the nodes share the cores, and Ray does not check that the GPUs of
`--gpus-per-node` exist. Ctrl-C or SIGTERM ends these nodes and nothing else (`ray stop` would end every Ray on this
machine). The nodes end, too, when this process is killed.
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
MACHINE_LABEL = "machine"
"""Label of each node, whose value is its number: `--stage-nodes machine=1,machine=0` names two of them."""

OBJECT_STORE_BYTES = 100_000_000  # per node; the stages' tensors do not go through it


def main() -> None:
    """Starts the nodes, prints their address, and waits for an interrupt."""
    args = parse_args()
    # Must be set before Ray is imported: with the first variable Ray listens on loopback only.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="ray-nodes-", dir="/tmp") as directory:  # short: Ray puts sockets there
        # In its default directory Ray would record these nodes as the cluster that a process without an address joins.
        os.environ["RAY_TMPDIR"] = directory
        try:
            with running_nodes(args) as cluster:
                announce(args.nodes, cluster, directory)
                signal.pause()
        except KeyboardInterrupt:
            print("Stopped.")


@contextmanager
def running_nodes(args: argparse.Namespace) -> Iterator[Any]:
    """Runs the nodes until the context ends, by the class that Ray's own tests use."""
    from ray.cluster_utils import Cluster

    catch_signals()
    cluster = Cluster()
    try:
        cluster.add_node(**head_options(args), labels={MACHINE_LABEL: "0"})
        for number in range(1, args.nodes):
            cluster.add_node(**node_options(args), labels={MACHINE_LABEL: str(number)})
        catch_signals()  # again: Ray has put its own handler of SIGTERM there
        yield cluster
    finally:
        cluster.shutdown()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start several Ray nodes on this machine, on loopback, until Ctrl-C.")
    parser.add_argument("nodes", type=int, metavar="N", help="number of nodes, the head included")
    parser.add_argument("--cpus-per-node", type=int, help="default: this machine's cores, shared; at least 1")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="default: 0")
    parser.add_argument("--no-dashboard", action="store_true", help="`serve deploy` needs the dashboard")
    args = parser.parse_args()
    if args.nodes < 1:
        parser.error(f"N must be at least 1, got {args.nodes}")
    if args.cpus_per_node is None:
        args.cpus_per_node = max(1, available_cores() // args.nodes)
    return args


def node_options(args: argparse.Namespace) -> dict[str, Any]:
    """Ray's options for each node."""
    return {
        "node_ip_address": LOOPBACK,
        "num_cpus": args.cpus_per_node,
        "num_gpus": args.gpus_per_node,
        "object_store_memory": OBJECT_STORE_BYTES,
    }


def head_options(args: argparse.Namespace) -> dict[str, Any]:
    """Ray's options for the head: a dashboard at a free port, as another Ray may use the default one."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
    return node_options(args) | {
        "include_dashboard": not args.no_dashboard,
        "dashboard_host": LOOPBACK,
        "dashboard_port": port,
    }


def announce(num_nodes: int, cluster: Any, directory: str) -> None:
    """Prints the address and the commands that use it."""
    print(f"{num_nodes} Ray nodes at {cluster.address}, logs in {directory} until they stop\n")
    # Without the first line Ray takes 127.0.0.1 for this machine's address on the network, where no node listens.
    print("  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0")
    print(f"  export RAY_ADDRESS={cluster.address}")
    if cluster.webui_url:
        print(f"  export RAY_DASHBOARD_ADDRESS=http://{cluster.webui_url}")
    print(f"  gptj-dist serve demo --stages {num_nodes}")
    print("\nCtrl-C stops them.", flush=True)


def catch_signals() -> None:
    """Makes the first SIGINT or SIGTERM a `KeyboardInterrupt`, and ignores later ones while the nodes end."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


if __name__ == "__main__":
    main()
