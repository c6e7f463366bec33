"""A family of processes, with all descendants: its CPU time, memory and open ports; stops and kills it. Linux only.

A process belongs to the family if it has inherited a mark in its environment, or descends from one that has. Neither
test is enough alone: Ray's processes leave their parents, and processes that change their title (vLLM's) overwrite
their environment.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "GPTJ_DIST_BENCHMARK"
_LISTENING = "0A"
_LOOPBACK = ("0100007F", "00000000000000000000000001000000")
"""127.0.0.1 and ::1 as `/proc/net/tcp` writes them."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Family:
    """The live processes that were started with `environment`, without this one."""

    def __init__(self) -> None:
        self._mark = f"{MARK}={uuid.uuid4().hex}"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with the mark."""
        name, _, value = self._mark.partition("=")
        return {**os.environ, name: value}

    def members(self) -> list[Path]:
        """The processes' directories in /proc."""
        mark = self._mark.encode()
        processes = [path for path in Path("/proc").glob("[0-9]*") if path.name != str(os.getpid())]
        family = {path.name for path in processes if mark in content(path / "environ").split(b"\0")}
        parent_of = {path.name: parent(path) for path in processes}
        while children := {name for name, of in parent_of.items() if of in family} - family:
            family |= children
        return [path for path in processes if path.name in family]

    def cpu_s(self) -> float:
        """CPU time that the live processes have used since they began."""
        return sum(map(cpu_s, self.members()))

    def memory_bytes(self) -> int:
        """Memory in use as PSS: a shared page counts in parts."""
        return sum(map(pss_bytes, self.members()))

    def kill(self) -> None:
        """Kills all processes of the family."""
        self._signal(signal.SIGKILL)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stops all processes until the context ends."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for path in self.members():
            with suppress(ProcessLookupError):
                os.kill(int(path.name), number)


def parent(process: Path) -> str:
    """The id of the parent process; empty if the process has ended (proc(5): field 4 of `stat`)."""
    fields = content(process / "stat").rpartition(b")")[2].split()
    return fields[1].decode() if fields else ""


def cpu_s(process: Path) -> float:
    """CPU time of a process in user and system mode (proc(5): fields 14 and 15 of `stat`); 0 if it has ended."""
    fields = content(process / "stat").rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def pss_bytes(process: Path) -> int:
    """PSS of a process: its own pages, and its parts of shared pages; 0 if it has ended."""
    for line in content(process / "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def own_bytes(process: Path) -> int:
    """Memory of a process that no file backs (proc(5): `RssAnon` of `status`); 0 if it has ended."""
    for line in content(process / "status").splitlines():
        if line.startswith(b"RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def num_files(process: Path) -> int:
    """Files, sockets and pipes that a process has open; 0 if it has ended."""
    return len(_links(process / "fd"))


def content(path: Path) -> bytes:
    """The content of a file in /proc; empty if its process has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def open_addresses(family: Family) -> set[str]:
    """`address:port` of the family's TCP sockets that listen on other addresses than loopback."""
    links = [link for process in family.members() for link in _links(process / "fd")]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for fields in map(str.split, content(Path("/proc/net") / table).decode().splitlines()[1:]):
            local, state, inode = fields[1], fields[3], fields[9]
            host, _, port = local.partition(":")
            if state == _LISTENING and inode in inodes and not host.endswith(_LOOPBACK):
                addresses.add(f"{'*' if not int(host, 16) else host}:{int(port, 16)}")
    return addresses


def _links(directory: Path) -> list[str]:
    """The targets of a process's file descriptors; empty if it has ended."""
    links = []
    with suppress(OSError):
        for path in directory.iterdir():
            with suppress(OSError):
                links.append(str(path.readlink()))
    return links
