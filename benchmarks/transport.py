"""Measures a round through a ring of stages that compute nothing, over our transport and over bare ZeroMQ.

    python -m benchmarks.transport                                four stages, frames of 64 KB
    python -m benchmarks.transport --stages 2 --frame-kb 8 --in-flight 3

Each stage is a process. A plan with one request per row of the frame goes from this process through all stages and
back, with hidden states on every edge: one edge more than in a pipeline. `round_trip_us` is the median with one frame
in flight; `step_us` is the time per frame with `--in-flight` frames in flight. Bare ZeroMQ carries the same bytes over
the same kind of sockets, without encoding and decoding. `shared` puts them into shared memory, one copy in and one out,
and sends only the number of the place over such a socket. The rings take turns. The last line on standard output is one
JSON document.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import NoReturn, Protocol

import zmq

from benchmarks.figures import Figures, machine, medians, print_document, print_row
from gptj_dist.engine.plan import Chunk, Plan
from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.edge import Inbound, Outbound
from gptj_dist.stages.transport.frames import Frame, HiddenStates, PlanFrame

HOST = "127.0.0.1"
EPOCH = 1
D_MODEL = 4096
ROW_BYTES = 2 * D_MODEL
NUM_WARM_UP = 50


class Ring(Protocol):
    """The end of a ring in this process. A frame that is sent returns after it has passed all stages."""

    def send(self) -> None:
        """Sends a frame."""

    def receive(self) -> None:
        """Waits for the oldest frame in flight."""


def main() -> None:
    args = _parser().parse_args()
    settings = {"stages": args.stages, "frame_kb": args.frame_kb, "in_flight": args.in_flight, "frames": args.frames}
    document = {"machine": machine(), **settings}
    rounds: dict[str, list[Figures]] = {"ours": [], "zeromq": [], "shared": []}
    with ExitStack() as stack:
        rings = {
            "ours": stack.enter_context(our_ring(args.stages, make_frame(args.frame_kb))),
            "zeromq": stack.enter_context(bare_ring(args.stages, bytes(1024 * args.frame_kb))),
            "shared": stack.enter_context(shared_ring(args.stages, bytes(1024 * args.frame_kb), args.in_flight)),
        }
        for _ in range(args.rounds):
            for name, ring in rings.items():
                rounds[name].append(time_ring(ring, args.frames, args.in_flight))
                print_row([name, *rounds[name][-1].values()])
    print_document("transport", document | {name: medians(figures) for name, figures in rounds.items()})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--frame-kb", type=int, default=64, help="hidden states of a frame, in KiB; a row has 8")
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--frames", type=int, default=2000, help="in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def make_frame(size_kb: int) -> PlanFrame:
    """A decode plan with one request per row of hidden states."""
    rows = max(1, 1024 * size_kb // ROW_BYTES)
    chunks = tuple(Chunk(i, 128, (i,), (), True) for i in range(rows))
    return PlanFrame(
        Plan(0, (), (), chunks), HiddenStates("bfloat16", (rows, D_MODEL), memoryview(bytes(1024 * size_kb)))
    )


def time_ring(ring: Ring, num_frames: int, in_flight: int) -> dict[str, float]:
    """Microseconds of a round trip alone, and per frame with `in_flight` frames in flight."""
    for _ in range(NUM_WARM_UP):
        _round_trip_s(ring)
    round_trips_s = [_round_trip_s(ring) for _ in range(num_frames)]
    for _ in range(in_flight):
        ring.send()
    begin = time.perf_counter()
    for _ in range(num_frames):
        ring.receive()
        ring.send()
    step_s = (time.perf_counter() - begin) / num_frames
    for _ in range(in_flight):
        ring.receive()
    return {"round_trip_us": 1e6 * statistics.median(round_trips_s), "step_us": 1e6 * step_s}


def _round_trip_s(ring: Ring) -> float:
    begin = time.perf_counter()
    ring.send()
    ring.receive()
    return time.perf_counter() - begin


class OurRing:
    """A ring over `gptj_dist.stages.transport`."""

    def __init__(self, inbound: Inbound, outbound: Outbound, frame: Frame) -> None:
        self._inbound = inbound
        self._outbound = outbound
        self._frame = frame

    def send(self) -> None:
        self._outbound.send(self._frame)

    def receive(self) -> None:
        self._inbound.receive()


@contextmanager
def our_ring(num_stages: int, frame: Frame) -> Iterator[Ring]:
    """A ring whose stages decode each frame and encode it again."""
    transport = open_transport(EPOCH)
    inbound = transport.inbound(HOST)
    with _processes(lambda: _our_stage, num_stages, inbound.address) as address:
        outbound = transport.outbound(address)
        yield OurRing(inbound, outbound, frame)
        outbound.close()
    inbound.close()


def _our_stage(connection: Connection) -> NoReturn:
    transport = open_transport(EPOCH)
    inbound = transport.inbound(HOST)
    connection.send(inbound.address)
    outbound = transport.outbound(connection.recv())
    while True:
        outbound.send(inbound.receive())


class BareRing:
    """A ring over ZeroMQ's sockets, without a codec."""

    def __init__(self, inbound: zmq.Socket[bytes], outbound: zmq.Socket[bytes], data: bytes) -> None:
        self._inbound = inbound
        self._outbound = outbound
        self._data = data

    def send(self) -> None:
        self._outbound.send(self._data)

    def receive(self) -> None:
        self._inbound.recv()


@contextmanager
def bare_ring(num_stages: int, data: bytes) -> Iterator[Ring]:
    """A ring whose stages forward bytes."""
    inbound = _bound()
    with _processes(lambda: _bare_stage, num_stages, _address(inbound)) as address:
        outbound = _connected(address)
        yield BareRing(inbound, outbound, data)
        outbound.close(linger=0)
    inbound.close(linger=0)


def _bare_stage(connection: Connection) -> NoReturn:
    inbound = _bound()
    connection.send(_address(inbound))
    outbound = _connected(connection.recv())
    while True:
        outbound.send(inbound.recv())


class SharedRing:
    """A ring over shared memory: each edge has places for all frames in flight."""

    def __init__(self, inbound: zmq.Socket[bytes], outbound: zmq.Socket[bytes], edges: Edges, data: bytes) -> None:
        self._inbound = inbound
        self._outbound = outbound
        self._first, self._last = edges.open(0), edges.open(edges.num_stages)
        self._edges = edges
        self._data = data
        self._num_sent = 0

    def send(self) -> None:
        place = self._num_sent % self._edges.num_places
        self._num_sent += 1
        self._edges.put(self._first, place, self._data)
        self._outbound.send(bytes([place]))

    def receive(self) -> None:
        self._edges.take(self._last, self._inbound.recv()[0])

    def close(self) -> None:
        """Frees the memory."""
        for memory in (self._first, self._last):
            memory.close()
        for index in range(self._edges.num_stages + 1):
            memory = self._edges.open(index)
            memory.close()
            memory.unlink()


@dataclass(frozen=True, slots=True)
class Edges:
    """The shared memory of a ring's edges: edge i leads to stage i, the last one back."""

    name: str
    num_stages: int
    num_places: int
    num_bytes: int

    def create(self) -> None:
        """Makes the memory of all edges, and touches it."""
        for index in range(self.num_stages + 1):
            memory = SharedMemory(f"{self.name}-{index}", create=True, size=self.num_places * self.num_bytes)
            self._bytes(memory)[:] = bytes(memory.size)
            memory.close()

    def open(self, index: int) -> SharedMemory:
        """The memory of an edge."""
        return SharedMemory(f"{self.name}-{index}")

    def put(self, memory: SharedMemory, place: int, data: bytes) -> None:
        """Copies a frame in."""
        self._bytes(memory)[place * self.num_bytes : (place + 1) * self.num_bytes] = data

    def take(self, memory: SharedMemory, place: int) -> bytes:
        """Copies a frame out."""
        return bytes(self._bytes(memory)[place * self.num_bytes : (place + 1) * self.num_bytes])

    def _bytes(self, memory: SharedMemory) -> memoryview:
        assert memory.buf is not None, "the memory is closed"
        return memory.buf


@contextmanager
def shared_ring(num_stages: int, data: bytes, num_places: int) -> Iterator[Ring]:
    """A ring whose stages copy bytes from one edge's memory to the next one's."""
    inbound = _bound()
    edges = Edges(f"gptj-dist-{os.getpid()}", num_stages, max(1, num_places), len(data))
    edges.create()
    stages = iter(range(num_stages))
    with _processes(lambda: partial(_shared_stage, edges, next(stages)), num_stages, _address(inbound)) as address:
        outbound = _connected(address)
        ring = SharedRing(inbound, outbound, edges, data)
        yield ring
        outbound.close(linger=0)
    ring.close()
    inbound.close(linger=0)


def _shared_stage(edges: Edges, index: int, connection: Connection) -> NoReturn:
    inbound = _bound()
    connection.send(_address(inbound))
    outbound = _connected(connection.recv())
    before, after = edges.open(index), edges.open(index + 1)
    while True:
        place = inbound.recv()
        edges.put(after, place[0], edges.take(before, place[0]))
        outbound.send(place)


def _bound() -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(f"tcp://{HOST}:0")
    return socket


def _address(socket: zmq.Socket[bytes]) -> str:
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def _connected(address: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(address)
    return socket


@contextmanager
def _processes(
    stage: Callable[[], Callable[[Connection], NoReturn]], num_stages: int, end_address: str
) -> Iterator[str]:
    """Runs stages that send to one another, the last to `end_address`, and kills them. Yields the first's address.

    Args:
        stage: makes what each process runs.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(num_stages)]
    processes = [context.Process(target=stage(), args=(theirs,), daemon=True) for _, theirs in pipes]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()  # so that the end of a stage ends the wait for its address
    try:
        addresses: Sequence[str] = [ours.recv() for ours, _ in pipes]
        for (ours, _), next_address in zip(pipes, [*addresses[1:], end_address], strict=True):
            ours.send(next_address)
        yield addresses[0]
    finally:
        for process in processes:
            process.kill()
            process.join()


if __name__ == "__main__":
    main()
