"""Sets the environment of the Ray that the launcher starts or joins: loopback only, no proxies, and a token.

ray and ray.serve read it when they are imported, and Ray's processes inherit it, so it must be set before that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping

from gptj_dist.operate.launch.processes import start_tick
from gptj_dist.operate.launch.tokens import give_token
from gptj_dist.serving.sockets import is_loopback

LOCAL_RAY_ENVIRONMENT = {
    # Ray listens on all interfaces unless it takes the machine for a desktop (`docs/decisions/0004-loopback.md`).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # With Ray's own value, 15, a server gets a thirtieth of a core's time beside each process that computes.
    "RAY_worker_niceness": "0",
    # Calls between deployments take the short way (`docs/decisions/0006-serve-settings.md`).
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Serve's own processes would use a tenth of a core while nothing happens.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # The policy that scales is to know of a burst after one second, not after ten.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
"""Settings of a Ray on this machine alone."""

CLUSTER_ENVIRONMENT = {
    name: value for name, value in LOCAL_RAY_ENVIRONMENT.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
}
"""Settings of a Ray whose nodes are on several machines."""

LAUNCHER_VARIABLE = "GPTJ_DIST_LAUNCHER"
"""In the environment of every process of a Ray that a launcher started: `PID:START`, so that `stop` finds them."""

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def prepare_local(start_timeout_s: float) -> None:
    """For a Ray that this process starts.

    Args:
        start_timeout_s: how long Ray's processes may wait for one another.
    """
    os.environ.update(LOCAL_RAY_ENVIRONMENT)
    os.environ[LAUNCHER_VARIABLE] = f"{os.getpid()}:{start_tick(os.getpid())}"
    give_time(start_timeout_s)
    bypass_proxies(LOOPBACK_HOSTS)
    give_token()


def give_time(start_timeout_s: float) -> None:
    """Lets processes of a Ray that this process starts wait so long for one another."""
    for variable, unit in (
        ("RAY_gcs_server_port_wait_time_s", 1),
        ("RAY_worker_register_timeout_seconds", 1),
        ("RAY_agent_register_timeout_ms", 1000),
    ):
        os.environ.setdefault(variable, str(round(start_timeout_s * unit)))


def prepare_joining(host: str) -> None:
    """For a Ray that runs already.

    Args:
        host: of its address; empty if that is not known.
    """
    if is_loopback(host):
        os.environ.update(LOCAL_RAY_ENVIRONMENT)
    bypass_proxies((*LOOPBACK_HOSTS, *([host] if host else [])))


def bypass_proxies(hosts: Iterable[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes this process and its children reach the hosts directly, whatever proxies the environment names.

    gRPC reads `no_grpc_proxy` before `no_proxy`, in lower case only; Python's libraries read either case.
    """
    for variable in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        given = environment.get(variable)
        if given is None and variable == "no_grpc_proxy":
            continue
        names = [name.strip() for name in (given or environment.get("no_proxy") or "").split(",") if name.strip()]
        if "*" not in names:
            environment[variable] = ",".join(dict.fromkeys((*names, *hosts)))
