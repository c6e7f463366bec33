"""Starts, watches and ends a Ray on this machine that lives as long as the launcher, and cleans up after it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.launch.environment import LAUNCHER_VARIABLE, prepare_local
from gptj_dist.operate.launch.processes import descendants, end_all, marked
from gptj_dist.operate.launch.session_room import OwnSessions, SessionRoom, why_unwritable

LEAST_ATTEMPT_S = 30.0
"""Ray itself gives its processes this long to start."""

MAX_CAUSE_CHARACTERS = 300

NOISE_LOG = "launcher.err"

NO_RAY = "127.0.0.1:1"
"""RAY_ADDRESS once Ray runs: Serve starts a new Ray where it finds none, such as when Ray has died."""

QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}


class LocalRay:
    """The Ray that this process starts, at most one.

    Args:
        room: where Ray keeps its sessions.
    """

    def __init__(self, room: SessionRoom) -> None:
        self._room = room
        self._sessions = OwnSessions(room.directory, "launcher")

    @property
    def noise(self) -> Path:
        """A file for what Ray prints in this process; among the session's logs once Ray runs or cannot start."""
        return self._sessions.noise

    def start(self, timeout_s: float, note: Callable[[str], None]) -> None:
        """Starts Ray; tries again as long as there is time, because a busy machine may need more than Ray waits.

        Args:
            timeout_s: no attempt begins when less than `LEAST_ATTEMPT_S` of it is left.
            note: receives a line for the user where something is not as usual.

        Raises:
            ConfigurationError: Ray did not start; the message says why.
        """
        if self._room.passed_over is not None:
            note(f"Ray keeps its files in {self._room.directory}, because {self._room.passed_over}.")
        prepare_local(timeout_s)
        begin_s = time.monotonic()
        while (failure := _try_to_start(self._room.directory)) is not None:
            spent_s = time.monotonic() - begin_s
            if message := self._reason_to_give_up(failure, spent_s, timeout_s):
                raise ConfigurationError(f"{message}{self._keep_noise()}") from failure
            note(f"Ray did not start within {spent_s:.0f} s; trying again ...")
            self._sessions.discard()
        self._keep_noise()
        os.environ["RAY_ADDRESS"] = NO_RAY

    def lost_process(self) -> str | None:
        """The name of a process of Ray's own that has ended, or None if all of them run."""
        from ray._private import worker  # not public: tests/http/test_stop.py fails if Ray changes it

        node = worker._global_node
        ended = {name for name, _ in node.dead_processes()} if node is not None else set()
        return next((name for name in ("gcs_server", "raylet") if name in ended), None)

    def stop(self) -> None:
        """Ends Ray and all processes that it has started."""
        import ray
        from ray._private import worker

        started = descendants(os.getpid())  # an agent of Ray's has a title in place of its environment
        if worker._global_node is not None:
            _end_at_once(worker._global_node)
        ray.shutdown()
        end_all(lambda: [*started, *_own_processes()])

    def discard_empty_logs(self) -> None:
        """Removes logs of this process's session into which nothing was written. Call when Ray has ended."""
        logs = [path for session in self._sessions.begun() for path in (session / "logs" / "gptj-dist").glob("*.log")]
        for path in (self.noise, *logs):
            with suppress(OSError):
                if path.stat().st_size == 0 or path.parent == self._room.directory:
                    path.unlink()

    def abandon(self, is_session_kept: bool) -> None:
        """Kills all processes that this one has started, without shutting Ray down first.

        Args:
            is_session_kept: else the session's directory is removed, too.
        """
        end_all(_own_processes)
        if not is_session_kept:
            self._sessions.discard_with_noise()

    def _reason_to_give_up(self, failure: Exception, spent_s: float, timeout_s: float) -> str:
        """The reason, for the user, not to try again; empty if another attempt may succeed in time."""
        if (cause := lasting_cause(failure, self._room.directory)) is not None:
            return f"Ray cannot start: {cause}"
        if spent_s + LEAST_ATTEMPT_S <= timeout_s:
            return ""
        return (
            f"Ray did not start within {spent_s:.0f} s ({_one_line(failure)}): on a busy machine --start-timeout-s "
            "gives it longer"
        )

    def _keep_noise(self) -> str:
        """Moves the noise to the logs of the last session. Returns the end of a message, which says where they are."""
        return "".join(self._sessions.keep_noise(path / "logs" / NOISE_LOG) for path in self._sessions.begun()[-1:])


def omit_unused_processes() -> None:
    """Makes a Ray that this process starts do without three of its processes, for one of which `ray.init` waits.

    Without a dashboard the API server only reports usage. The log monitor prints logs at the terminal. The monitor is
    Ray's autoscaler: `serve` has this machine alone, and the machines of `up` come by `join`.
    """
    from ray._private.node import Node

    Node.start_api_server = Node.start_log_monitor = Node.start_monitor = lambda _node, **_: None


def lasting_cause(error: Exception, directory: Path) -> str | None:
    """Why Ray would not start at the next attempt either; None if it may."""
    match error:
        case OSError(filename=str() as name):
            return why_unwritable(Path(name), error)
        case OSError(errno=int()):
            return why_unwritable(directory, error)
        case OSError() if "AF_UNIX" in str(error):
            return f"the path {directory} is too long for its sockets; set RAY_TMPDIR to a shorter one"
        case ValueError() | TypeError():  # of a setting in the environment
            return _one_line(error)
    return None


def _try_to_start(directory: Path) -> Exception | None:
    """Starts Ray and returns None, or returns why that failed, when all that was started has ended."""
    import ray

    omit_unused_processes()
    try:
        ray.init(
            address="local", _node_ip_address="127.0.0.1", include_dashboard=False, _temp_dir=str(directory), **QUIET
        )
    except Exception as error:
        ray.shutdown()
        end_all(_own_processes)
        return error
    return None


def _end_at_once(node: Any) -> None:
    """Has `ray.shutdown` kill Ray's processes: it would wait a second for each of them, as they ignore SIGTERM."""
    kill_all = node.kill_all_processes
    node.kill_all_processes = lambda **_: kill_all(check_alive=False, allow_graceful=False, wait=True)


def _own_processes() -> list[int]:
    """All processes that this one has started, and those of its Ray whose parents have died."""
    mark = os.environ.get(LAUNCHER_VARIABLE, "")
    return [*descendants(os.getpid()), *(marked(LAUNCHER_VARIABLE, mark) if mark else ())]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_CAUSE_CHARACTERS else f"{text[:MAX_CAUSE_CHARACTERS]} ..."
