"""Machines of a small network on this one: a network namespace each, and a switch in a process that delays frames.

Needs root, `ip` of iproute2 and `/dev/net/tun`. Kernels without netem cannot delay packets themselves, so each
machine's interface is a TAP device, whose frames the switch reads, holds back and writes. It runs with real-time
priority. Stdlib only.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import multiprocessing
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

NETWORK = "10.77.8"
"""First numbers of the addresses; machine i has NETWORK.i, this one NETWORK.254."""

RATE_BYTES_S = 125e6
"""A Gbit/s: the rate until `Network.set_rate` is called."""

MTU = 60_000
"""Large, so that the switch keeps up with the rate."""

PRIORITY = 10

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_HERE = 0
"""The number of this machine. Frames from it and to it are neither delayed nor held back by a rate."""


class Network:
    """Machines 1 .. n. Made by `network`."""

    def __init__(self, num_machines: int, switch: Connection) -> None:
        self.machines = range(1, num_machines + 1)
        self._switch = switch

    def address(self, machine: int) -> str:
        return f"{NETWORK}.{machine}"

    def command(self, machine: int, command: Sequence[str]) -> list[str]:
        """A command as it is run on a machine."""
        return ["ip", "netns", "exec", f"gptj{machine}", *command]

    def set_delay(self, delay_ms: float) -> None:
        """Sets the time of a frame from any machine to another."""
        self._switch.send(("delay", delay_ms * 1e-3))

    def set_rate(self, mbit_s: float) -> None:
        """Sets the rate at which each machine sends to the others."""
        self._switch.send(("rate", mbit_s * 1e6 / 8))

    def cut(self, machine: int) -> None:
        """Drops all that comes from it or goes to it, as when its cable is pulled."""
        self._switch.send(("cut", machine))

    def heal(self, machine: int) -> None:
        self._switch.send(("heal", machine))


@contextmanager
def network(num_machines: int) -> Iterator[Network]:
    """Makes the machines, and removes them when the context ends. What runs in them is the caller's to end.

    From then on SIGTERM raises SystemExit, so that a benchmark with a time limit leaves nothing, too.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    taps = [_open_tap(f"gptjt{machine}") for machine in range(num_machines + 1)]
    ours, switchs = multiprocessing.Pipe()
    switch = multiprocessing.get_context("fork").Process(target=_run_switch, args=(taps, switchs), daemon=True)
    made = Network(num_machines, ours)
    try:
        for words in (f"addr add {NETWORK}.254/24 dev gptjt0", f"link set gptjt0 mtu {MTU} up"):
            _run("ip", *words.split())
        for machine in made.machines:
            _add(made, machine)
        switch.start()
        yield made
    finally:
        if switch.pid is not None:
            switch.kill()
            switch.join()
        for tap in taps:
            os.close(tap)
        for machine in made.machines:
            subprocess.run(["ip", "netns", "del", f"gptj{machine}"], check=False, capture_output=True)


def _open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def _add(made: Network, machine: int) -> None:
    _run("ip", "netns", "add", f"gptj{machine}")
    _run("ip", "link", "set", f"gptjt{machine}", "netns", f"gptj{machine}", "name", "eth0", "mtu", str(MTU))
    for words in (
        "ip link set lo up",
        f"ip addr add {made.address(machine)}/24 dev eth0",
        "ip link set eth0 up",
        f"ip route add default via {NETWORK}.254",
    ):
        _run(*made.command(machine, words.split()))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _run_switch(taps: Sequence[int], commands: Connection) -> None:
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    Switch(taps).run(commands)


class Switch:
    """Carries frames between TAP devices."""

    def __init__(self, taps: Sequence[int]) -> None:
        self._taps = taps
        self._delay_s = 0.0
        self._rate_bytes_s = RATE_BYTES_S
        self._cut: set[int] = set()
        self._port_of: dict[bytes, int] = {}
        self._free_s = [0.0] * len(taps)
        self._due: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()

    def run(self, commands: Connection) -> None:
        """Until it is killed."""
        poll = select.epoll()
        for descriptor in (*self._taps, commands.fileno()):
            poll.register(descriptor, select.EPOLLIN)
        port_at = {tap: port for port, tap in enumerate(self._taps)}
        while True:
            wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else -1
            for descriptor, _ in poll.poll(wait_s):
                if descriptor in port_at:
                    self._read_all(port_at[descriptor])
                else:
                    self._obey(*commands.recv())
            self._deliver()

    def _obey(self, command: str, value: float) -> None:
        if command == "delay":
            self._delay_s = value
        elif command == "rate":
            self._rate_bytes_s = value
        elif command == "cut":
            self._cut.add(int(value))
        else:
            self._cut.discard(int(value))

    def _read_all(self, port: int) -> None:
        with suppress(BlockingIOError):
            while True:
                self._take(port, os.read(self._taps[port], MTU + 100))

    def _take(self, port: int, frame: bytes) -> None:
        if port in self._cut:
            return
        now_s = time.monotonic()
        self._port_of[frame[6:12]] = port
        known = self._port_of.get(frame[:6])
        targets = [target for target in ([known] if known is not None else range(len(self._taps))) if target != port]
        if port != _HERE and set(targets) - {_HERE}:
            self._free_s[port] = max(now_s, self._free_s[port]) + len(frame) / self._rate_bytes_s
        for target in targets:
            due_s = now_s if _HERE in (port, target) else self._free_s[port] + self._delay_s
            heapq.heappush(self._due, (due_s, next(self._order), target, frame))

    def _deliver(self) -> None:
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s:
            _, _, target, frame = heapq.heappop(self._due)
            if target not in self._cut:
                with suppress(OSError):  # its queue is full, or the interface is down
                    os.write(self._taps[target], frame)
