"""The limits that this process's control groups set: CPU time and memory, in version 1 and version 2. Linux.

A limit of any enclosing group holds, so all groups from the process's own up to the one at the mount point are read.
See `Documentation/admin-guide/cgroup-v1` and `cgroup-v2.rst` of the Linux kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class _Group:
    """A control group's directory, and whether its files are those of version 2."""

    directory: Path
    is_v2: bool

    def text(self, name: str) -> str:
        """A file's content; empty if the group has no such file."""
        try:
            return (self.directory / name).read_text().strip()
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """The number in a file; None without a limit (no such file, or `max` in version 2)."""
        text = self.text(name)
        return int(text) if text.lstrip("-").isdigit() else None

    def statistic(self, name: str) -> int:
        """A line of `memory.stat`, in bytes; 0 if the line is missing."""
        lines = (line.split() for line in self.text("memory.stat").splitlines())
        return next((int(value) for key, value in lines if key == name), 0)


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """CPU seconds a second that this process's control groups allow; None if they set no limit.

    Args:
        proc: the process's directory.
    """
    return min((quota for group in _groups("cpu", proc) if (quota := _cpu_quota(group)) is not None), default=None)


def memory_limit_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """The most memory that this process's control groups allow; None if they set no limit."""
    groups = _groups("memory", proc)
    return min((limit for group in groups if (limit := _memory_limit(group)) is not None), default=None)


def free_memory_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """What those limits leave; page cache that the kernel can drop counts as free. None if they set no limit."""
    return min(
        (
            limit - _memory_used(group)
            for group in _groups("memory", proc)
            if (limit := _memory_limit(group)) is not None
        ),
        default=None,
    )


def _cpu_quota(group: _Group) -> float | None:
    if group.is_v2:
        quota, _, period = group.text("cpu.max").partition(" ")
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
    quota_us, period_us = group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None  # -1: no limit


def _memory_limit(group: _Group) -> int | None:
    return group.number("memory.max" if group.is_v2 else "memory.limit_in_bytes")


def _memory_used(group: _Group) -> int:
    if group.is_v2:
        return (group.number("memory.current") or 0) - group.statistic("inactive_file")
    return (group.number("memory.usage_in_bytes") or 0) - group.statistic("total_inactive_file")


def _groups(controller: str, proc: Path) -> Iterator[_Group]:
    """This process's control groups that may limit a controller, from the inmost to the outmost that is visible."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in memberships:
        is_v2 = not controllers
        if not is_v2 and controller not in controllers.split(","):
            continue
        for fields in mounts:
            kind, options = _file_system(fields)
            if kind == "cgroup2" if is_v2 else kind == "cgroup" and controller in options.split(","):
                root, mount_point = map(_unescaped, fields[3:5])
                yield from _ancestry(PurePosixPath(path), PurePosixPath(root), Path(mount_point), is_v2)


def _file_system(fields: list[str]) -> tuple[str, str]:
    """Of a line of `mountinfo`: the file system's type, and its own options (proc_pid_mountinfo(5))."""
    kind, _, options = fields[fields.index("-") + 1 :][:3]
    return kind, options


def _unescaped(text: str) -> str:
    """A path of `mountinfo`, in which a blank is written as `\\040`."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), text)


def _ancestry(path: PurePosixPath, root: PurePosixPath, mount_point: Path, is_v2: bool) -> Iterator[_Group]:
    """A group and those around it, as far as they are below what is mounted.

    Args:
        path: the group's, from the root of all groups.
        root: the group that is mounted.
    """
    below = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()  # the path may be the host's
    while below.parts:
        yield _Group(mount_point / below, is_v2)
        below = below.parent
    yield _Group(mount_point, is_v2)
