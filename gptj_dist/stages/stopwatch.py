"""Times the steps of stages: one process a stage, all running at the same time, as in a pipeline.

This module makes the plans itself, without a scheduler, so that every step has exactly the rows of its case. CPUs only.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from gptj_dist.config import BLOCK_SIZE_TOKENS, DTypeName
from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.plan import Chunk, NewRequest, Plan
from gptj_dist.errors import GPTJDistError, StageFailedError
from gptj_dist.params import SamplingParams
from gptj_dist.planning.cost import Chunks
from gptj_dist.stages.blueprint import StageSpec
from gptj_dist.stages.runner import TORCH_DTYPES, StageOutput, StageRunner

CASE_S = 0.2
"""Seconds for which a case is repeated."""

MIN_REPEATS = 4
WINDOW_S = 0.1
"""The usual period of a CPU quota: a stage that is held to half speed runs for half of it, and stands for the rest."""

NUM_WINDOWS = 3
FILL_TOKENS = 128
"""Rows of the chunks that bring requests to the length that a case starts from."""

MAX_BLOCKS = 8192
"""KV blocks, if there is memory: 64 requests of 2,048 tokens."""

GREEDY = SamplingParams(temperature=0)

BARRIER_TIMEOUT_S = 600.0
"""Seconds after which a process assumes that another one died."""


class StageStopwatch:
    """Loads one stage and times its steps."""

    def __init__(self, spec: StageSpec, dtype: DTypeName, num_threads: int) -> None:
        self._spec = spec
        self._runner = StageRunner(spec)
        report = self._runner.load(dtype, num_threads)
        free_blocks = report.free_bytes // 2 // (report.kv_bytes_per_token * BLOCK_SIZE_TOKENS)
        self._pool = BlockPool(min(free_blocks, MAX_BLOCKS), BLOCK_SIZE_TOKENS)
        self._runner.allocate(self._pool.num_blocks)
        self._dtype = TORCH_DTYPES[dtype]
        self._released: tuple[int, ...] = ()
        self._plan_ids, self._request_ids = itertools.count(), itertools.count()
        self._filled: dict[int, list[int]] = {}
        self._blocks_of: dict[int, list[int]] = {}

    def prepare(self, case: Chunks) -> None:
        """Makes the requests that a case continues, and runs the case once, because the first run is slower."""
        start = case.context_tokens - case.num_tokens
        filled = self._filled.setdefault(start, [])
        while start and len(filled) < case.num_requests:
            request_id = next(self._request_ids)
            for first in range(0, start, FILL_TOKENS):
                self._step([request_id], first, min(FILL_TOKENS, start - first))
            filled.append(request_id)
        self._step_case(case)

    def time(self, case: Chunks) -> float:
        """Seconds of a case's step: the first quartile of repetitions at the same positions, as others only slow it."""
        seconds: list[float] = []
        end = time.perf_counter() + CASE_S
        while len(seconds) < MIN_REPEATS or time.perf_counter() < end:
            seconds.append(self._step_case(case))
        return sorted(seconds)[len(seconds) // 4]

    def time_held(self, case: Chunks) -> float:
        """Seconds of a case's step under the CPU quota of this process: the median of several periods' means.

        A quota makes single steps fast and few, so `time` would not see it.
        """
        means = []
        for _ in range(NUM_WINDOWS):
            begin = time.perf_counter()
            num_steps = 0
            while (elapsed_s := time.perf_counter() - begin) < WINDOW_S or not num_steps:
                self._step_case(case)
                num_steps += 1
            means.append(elapsed_s / num_steps)
        return statistics.median(means)

    def _step_case(self, case: Chunks) -> float:
        start = case.context_tokens - case.num_tokens
        if start:
            return self._step(self._filled[start][: case.num_requests], start, case.num_tokens, case.has_samples)
        request_ids = [next(self._request_ids) for _ in range(case.num_requests)]
        seconds = self._step(request_ids, 0, case.num_tokens, case.has_samples)
        self._released = tuple(request_ids)
        for request_id in request_ids:
            self._pool.give_back(self._blocks_of.pop(request_id))
        return seconds

    def _step(self, request_ids: Sequence[int], start: int, num_tokens: int, has_samples: bool = True) -> float:
        """Computes one plan, in which each request has the same number of tokens; returns the seconds it took."""
        token_ids = tuple((start + i) % self._spec.config.vocab_size for i in range(num_tokens))
        plan = Plan(
            next(self._plan_ids),
            self._released,
            tuple(NewRequest(id_, GREEDY, id_, num_tokens) for id_ in request_ids) if start == 0 else (),
            tuple(
                Chunk(id_, start, token_ids, self._new_blocks(id_, start + num_tokens), has_samples)
                for id_ in request_ids
            ),
        )
        self._released = ()
        before = None
        if not self._spec.layers.is_first:
            before = StageOutput(torch.randn(plan.num_tokens, self._spec.config.d_model).to(self._dtype))
        begin = time.perf_counter()
        self._runner.step(plan, before)
        return time.perf_counter() - begin

    def _new_blocks(self, request_id: int, num_tokens: int) -> tuple[int, ...]:
        """KV blocks that the request needs for `num_tokens` tokens, beyond those it has."""
        held = self._blocks_of.setdefault(request_id, [])
        new = self._pool.take(max(0, self._pool.blocks_for(num_tokens) - len(held)))
        held += new
        return tuple(new)


@dataclass(frozen=True, slots=True)
class Timing:
    """The answer of a process of the team.

    Args:
        seconds: duration of the step.
        cpu_s: CPU time of the process since it started.
    """

    seconds: float
    cpu_s: float


class Team:
    """Processes that time steps together. All have the same number of stages, and each computes one stage at a time."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        self._cpu_s = [_receive(connection).cpu_s for connection in connections]

    @property
    def cpu_s(self) -> float:
        """CPU seconds of this process, and of the team's processes up to their last answer."""
        return sum(self._cpu_s) + time.process_time()

    def time(self, index: int, case: Chunks) -> list[float]:
        """Seconds that stage `index` of each process takes for a step of the case, all at the same time.

        Raises:
            StageFailedError: a process died.
        """
        for connection in self._connections:
            with suppress(ConnectionError):  # its process has died, as receiving from it will show
                connection.send((index, case))
        timings = [_receive(connection) for connection in self._connections]
        self._cpu_s = [timing.cpu_s for timing in timings]
        return [timing.seconds for timing in timings]


def busy_cpu_s() -> float:
    """CPU seconds of all processes since the machine started (proc(5): user, nice and system)."""
    ticks = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def open_team(specs: Sequence[Sequence[StageSpec]], dtype: DTypeName, num_threads: int) -> Iterator[Team]:
    """Starts one process for each list of stages. The process loads the stages of its list.

    Args:
        num_threads: torch threads of each process.

    Raises:
        ConfigurationError: a stage cannot be loaded.
        StageFailedError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(specs))
    pipes = [context.Pipe() for _ in specs]
    processes = [
        context.Process(target=_work, args=(theirs, barrier, own, dtype, num_threads), daemon=True)
        for (_, theirs), own in zip(pipes, specs, strict=True)
    ]
    try:
        taken = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process alone
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # the pipe then closes when the process ends
        signal.pthread_sigmask(signal.SIG_SETMASK, taken)
        yield Team([ours for ours, _ in pipes])
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _receive(connection: Connection) -> Timing:
    try:
        answer: Timing | GPTJDistError = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise StageFailedError("a process that timed a stage died; was there enough memory?") from error
    if isinstance(answer, GPTJDistError):
        raise answer
    return answer


def _work(
    connection: Connection, barrier: Barrier, specs: Sequence[StageSpec], dtype: DTypeName, num_threads: int
) -> None:
    """A process of the team: loads, then answers each (index, case) with its seconds, until the connection closes."""
    try:
        stages = [StageStopwatch(spec, dtype, num_threads) for spec in specs]
        connection.send(Timing(0.0, time.process_time()))
        while True:
            index, case = connection.recv()
            stages[index].prepare(case)
            barrier.wait(BARRIER_TIMEOUT_S)
            connection.send(Timing(stages[index].time(case), time.process_time()))
    except GPTJDistError as error:
        connection.send(error)
    except (EOFError, ConnectionError):  # the parent process has ended
        return
    finally:
        barrier.abort()
