"""Holds a process to a share of a CPU, for a measurement: by a CPU quota of a control group, else by stopping it often.

Linux only. A quota needs a writable control group of version 1 or 2, which root often has.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PERIOD_US = 10_000
"""Short beside a step, so that a step is slowed down and not delayed."""

CGROUPS = Path("/sys/fs/cgroup")


@contextmanager
def throttled(pid: int, share: float) -> Iterator[str]:
    """Holds all threads of a process to a share of one CPU until the context ends. Yields the means: `quota`, `stops`.

    Args:
        share: from 0 to 1.
    """
    directory = _new_group(pid, share)
    if directory is None:
        with _stopped_often(pid, share):
            yield "stops"
        return
    try:
        yield "quota"
    finally:
        (directory.parent / "cgroup.procs").write_text(str(pid))
        directory.rmdir()


def _new_group(pid: int, share: float) -> Path | None:
    """A control group with the quota and the process in it; None where groups cannot be made."""
    quota_us = round(share * PERIOD_US)
    for root, settings in (
        (CGROUPS / "cpu", {"cpu.cfs_period_us": PERIOD_US, "cpu.cfs_quota_us": quota_us}),
        (CGROUPS, {"cpu.max": f"{quota_us} {PERIOD_US}"}),
    ):
        directory = root / f"throttled-{pid}"
        with suppress(OSError):
            directory.mkdir()
            try:
                for name, value in settings.items():
                    (directory / name).write_text(str(value))
                (directory / "cgroup.procs").write_text(str(pid))
                return directory
            except OSError:
                directory.rmdir()
    return None


@contextmanager
def _stopped_often(pid: int, share: float) -> Iterator[None]:
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            os.kill(pid, signal.SIGSTOP)
            done.wait((1 - share) * PERIOD_US / 1e6)
            os.kill(pid, signal.SIGCONT)
            done.wait(share * PERIOD_US / 1e6)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
