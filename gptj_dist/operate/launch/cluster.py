"""Finds and joins a Ray that runs already, and asks which applications it serves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.launch.environment import prepare_joining
from gptj_dist.operate.launch.local_ray import QUIET
from gptj_dist.operate.launch.processes import command_lines
from gptj_dist.operate.launch.tokens import take_token
from gptj_dist.serving.sockets import why_not_reach

AUTO = "auto"
DIAL_TIMEOUT_S = 5.0
NODES_POLL_S = 0.5
_GCS_ARGUMENT = "--gcs-address="


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the Ray at the address, which stays when the context ends. Prints nothing.

    Args:
        address: `host:port`, `auto` for the Ray that runs on this machine, or anything else that `ray.init` takes.

    Raises:
        ConfigurationError: no Ray answers there, or this process cannot join it.
    """
    address = find_ray() if address == AUTO else address
    host = ""
    if (place := split_address(address)) is not None:
        host, port = place
        if reason := why_not_reach(host, port, DIAL_TIMEOUT_S):  # Ray itself would try for minutes
            raise ConfigurationError(f"no Ray answers at {address}: {reason}")
        take_token(address)
    prepare_joining(host)
    import ray

    try:
        ray.init(address=address, **QUIET)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())  # of different versions Ray speaks in several lines
        raise ConfigurationError(f"cannot join Ray at {address}: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def reachable(address: str | None) -> str:
    """The address of a Ray that answers, whose token this process shows from now on. Joins nothing.

    Args:
        address: `host:port`; `auto` or None for the Ray that runs on this machine.

    Raises:
        ConfigurationError: no Ray answers there, or it refuses this process.
    """
    address = find_ray() if address in (None, AUTO) else address
    if (place := split_address(address)) is None:
        raise ConfigurationError(f"--address takes HOST:PORT, got {address!r:.80}")
    host, port = place
    if reason := why_not_reach(host, port, DIAL_TIMEOUT_S):
        raise ConfigurationError(f"no Ray answers at {address}: {reason}")
    take_token(address)
    prepare_joining(host)
    return address


def find_ray() -> str:
    """The address of the one Ray that runs on this machine.

    ray's own search takes any of several, and looks at the wrong address for a Ray that listens on loopback.

    Raises:
        ConfigurationError: no Ray or more than one runs on this machine.
    """
    arguments = [argument for line in command_lines().values() for argument in line]
    found = sorted({a.removeprefix(_GCS_ARGUMENT) for a in arguments if a.startswith(_GCS_ARGUMENT)})
    if not found:
        raise ConfigurationError("no Ray runs on this machine; --address HOST:PORT names one elsewhere")
    if len(found) > 1:
        raise ConfigurationError(f"several Rays run on this machine: choose one by --address, of {', '.join(found)}")
    return found[0]


def await_nodes(num_nodes: int, limit_s: float, show: Callable[[str], None], alive: Callable[[], list[str]]) -> None:
    """Waits until the cluster has so many nodes.

    Args:
        show: receives what it waits for, again and again.
        alive: gives the names of the living nodes, as `living_nodes`.

    Raises:
        ConfigurationError: it has fewer after `limit_s`.
    """
    deadline_s = time.monotonic() + limit_s
    while len(names := alive()) < num_nodes:
        told = f"{len(names)} of {num_nodes} nodes are there: {', '.join(names)}"
        if time.monotonic() > deadline_s:
            raise ConfigurationError(f"--wait-nodes: after {limit_s:g} s {told}; `gptj-dist join` adds one")
        show(f"Waiting for nodes; {told}")
        time.sleep(NODES_POLL_S)


def living_nodes() -> list[str]:
    """Name and address of each node of the connected cluster."""
    import ray

    return sorted(f"{n['NodeManagerHostname']} ({n['NodeManagerAddress']})" for n in ray.nodes() if n["Alive"])


def http_address() -> tuple[str, int]:
    """Where Serve listens. The first start of Serve on a cluster decides that; later settings are ignored."""
    from ray.serve.context import _get_global_client

    http = _get_global_client().http_config
    return http.host, http.port


def applications_served() -> tuple[str, ...] | None:
    """The names of the connected cluster's Serve applications, or None if it runs no Serve."""
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # Serve would print each of its steps
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    return tuple(serve.status().applications)


def stop_limit_s(name: str) -> float:
    """How long an application's requests may take to end once Serve deletes it: what its pipelines have to stop, which
    is `drain_s` and a little. Of one that Serve deletes already, what is left of it has."""
    from ray.serve.context import _get_global_client

    deployments = _get_global_client().get_serve_details()["applications"][name]["deployments"].values()
    return min((found["deployment_config"]["graceful_shutdown_timeout_s"] for found in deployments), default=0.0)


def split_address(address: str) -> tuple[str, int] | None:
    """Host and port of a plain `host:port`; None of anything else, such as `ray://host:port`."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not (port.isascii() and port.isdigit()):
        return None
    return host.strip("[]"), int(port)
