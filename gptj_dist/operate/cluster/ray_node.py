"""One node of Ray, the head or a further one, that lives as long as this process."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_dist.errors import ConfigurationError, one_line
from gptj_dist.operate.launch.environment import (
    CLUSTER_ENVIRONMENT,
    LOCAL_RAY_ENVIRONMENT,
    bypass_proxies,
    give_time,
)
from gptj_dist.operate.launch.local_ray import LEAST_ATTEMPT_S, lasting_cause, omit_unused_processes
from gptj_dist.operate.launch.processes import descendants, end_all, marked, start_tick
from gptj_dist.operate.launch.session_room import OwnSessions, find_room
from gptj_dist.operate.launch.terminal import diverted
from gptj_dist.operate.launch.tokens import use_token
from gptj_dist.serving.sockets import is_loopback

NODE_VARIABLE = "GPTJ_DIST_NODE"
"""In the environment of every process of a node that `up` or `join` started: `PID:START` of that."""

HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
"""The GCS gives a node up after 12 to 16 s of silence, not after a minute: its stages then start elsewhere. A network
that fails for some seconds loses nothing."""


START_LIMIT_S = 180.0
"""How long Ray's processes may wait for one another."""


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What a node offers.

    Args:
        host: its address in the cluster.
        gcs: address of the GCS; the head starts it there.
        token: of the cluster.
        num_cpus, num_gpus: None lets Ray count.
    """

    host: str
    gcs: str
    token: str
    num_cpus: int | None = None
    num_gpus: int | None = None


class NodeStart:
    """A start of a node by this process, and what it leaves on this machine.

    Attributes:
        sessions: those of a head. A node that joins begins none.

    Raises:
        ConfigurationError: there is no directory for Ray's files.
    """

    def __init__(self) -> None:
        self.sessions = OwnSessions(find_room().directory, "node")

    def abandon(self, is_session_kept: bool) -> None:
        """Ends all processes that were started. For any thread.

        Args:
            is_session_kept: else the files of the session are removed, if this process has begun it.
        """
        _end_own_processes()
        self.sessions.noise.unlink(missing_ok=True)
        if not is_session_kept:
            self.sessions.discard()


class RayNode:
    """Ray's processes of this node. Made by `start`."""

    def __init__(self, node: Any) -> None:
        self._node = node

    @classmethod
    def start(cls, start: NodeStart, options: NodeOptions, is_head: bool) -> RayNode:
        """Starts them.

        Raises:
            ConfigurationError: Ray does not start; the message says why, and where its logs are.
        """
        _prepare(options)
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        omit_unused_processes()
        sessions = start.sessions
        port = int(options.gcs.rpartition(":")[2])
        params = RayParams(
            node_ip_address=options.host,
            gcs_address=None if is_head else options.gcs,
            gcs_server_port=port if is_head else None,
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            temp_dir=str(sessions.directory),
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
            dashboard_agent_listen_port=None,  # several nodes may be on one machine
            min_worker_port=0,
            max_worker_port=0,
        )
        begin_s = time.monotonic()
        while True:  # on a busy machine the raylet may need more than the half minute that Ray waits for it
            node = Node.__new__(Node)  # one that does not start knows where its logs are, too
            try:
                with diverted(sessions.noise):  # Ray prints without being asked
                    Node.__init__(node, copy(params), head=is_head, shutdown_at_exit=False, spawn_reaper=True)
            except Exception as error:
                _end_own_processes()
                cause = lasting_cause(error, sessions.directory)
                if cause is not None or time.monotonic() - begin_s + LEAST_ATTEMPT_S > START_LIMIT_S:
                    told = cause or one_line(error) or type(error).__name__
                    raise ConfigurationError(f"Ray cannot start: {told}{_keep_noise(sessions, node)}") from error
                sessions.discard_with_noise()
            else:
                sessions.noise.unlink(missing_ok=True)
                return cls(node)

    @property
    def node_id(self) -> str:
        """Ray's id of the node, in hexadecimal."""
        return str(self._node.node_id)

    @property
    def logs(self) -> Path:
        return Path(self._node.get_logs_dir_path())

    def lost_process(self) -> str | None:
        """The name of a process of Ray's own that has ended, or None if all of them run."""
        ended = {name for name, _ in self._node.dead_processes()}
        return next((name for name in ("gcs_server", "raylet") if name in ended), None)

    def stop(self) -> None:
        """Ends them, and all processes that they have started."""
        with suppress(Exception):  # whatever Ray says of a process that has gone, all are ended below
            self._node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        _end_own_processes()


def _prepare(options: NodeOptions) -> None:
    os.environ.update(LOCAL_RAY_ENVIRONMENT if is_loopback(options.host) else CLUSTER_ENVIRONMENT)
    os.environ.update(HEALTH_CHECKS)
    give_time(START_LIMIT_S)
    os.environ[NODE_VARIABLE] = f"{os.getpid()}:{start_tick(os.getpid())}"
    bypass_proxies((options.host, options.gcs.rpartition(":")[0]))
    use_token(options.gcs, options.token)


def _keep_noise(sessions: OwnSessions, node: Any) -> str:
    """Moves the noise to the logs of a node that did not start. Returns the end of a message: where they are."""
    try:
        logs: Path | None = Path(node.get_logs_dir_path())
    except AttributeError:  # it failed before it chose a directory
        logs = None
    if logs is not None and (told := sessions.keep_noise(logs / sessions.noise.name)):
        return told
    sessions.noise.unlink(missing_ok=True)
    return ""


def _end_own_processes() -> None:
    own, mark = os.getpid(), os.environ.get(NODE_VARIABLE)
    end_all(lambda: [pid for pid in (*descendants(own), *(marked(NODE_VARIABLE, mark) if mark else ())) if pid != own])
