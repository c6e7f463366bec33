"""Keeps Ray and Serve on the address of their node.

Ray binds what it can to all interfaces unless it believes that it runs on a desktop system, and each Serve replica
opens a gRPC port on `[::]` without a setting. Both are moved to the address that the node has in its cluster, which on
a cluster of one machine is the loopback address. `docs/decisions/0004-loopback.md` has the details.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.serve._private.replica as serve_replica

_ALL_INTERFACES = "[::]:"


def keep_replica_on_node_address() -> None:
    """Called in a replica's constructor, before Serve opens the replica's port for calls between deployments."""
    open_port = serve_replica.add_port_to_grpc_server

    def open_port_on_node_address(server: Any, address: str) -> int:
        host = ray.util.get_node_ip_address()
        port: int = open_port(server, address.replace(_ALL_INTERFACES, f"{host}:"))
        return port

    serve_replica.add_port_to_grpc_server = open_port_on_node_address
