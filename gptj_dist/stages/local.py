"""Runs a whole pipeline in one process, without Ray. Its stages take turns on one thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from gptj_dist.config import PipelineConfig
from gptj_dist.engine.clock import SteadyClock
from gptj_dist.engine.plan import Plan, Result, StageTiming
from gptj_dist.errors import StageFailedError
from gptj_dist.params import AdapterSource
from gptj_dist.stages.blueprint import LoadedPipeline, choose_dtype, draw_blueprint
from gptj_dist.stages.device import local_device
from gptj_dist.stages.room import count_kv_blocks, require_memory
from gptj_dist.stages.runner import StageOutput, StageRunner


class LocalExecutor:
    """Computes plans on one thread. Each plan goes through all stages before the next one starts.

    Args:
        thread: the thread on which the runners were loaded.
    """

    def __init__(self, runners: tuple[StageRunner, ...], thread: ThreadPoolExecutor) -> None:
        self._runners = runners
        self._clock = SteadyClock()
        self._thread = thread
        self._results: asyncio.Queue[asyncio.Future[Result]] = asyncio.Queue()

    def submit(self, plan: Plan) -> None:
        self._results.put_nowait(asyncio.get_running_loop().run_in_executor(self._thread, self._compute, plan))

    async def receive(self) -> Result:
        result = await self._results.get()
        try:
            return await result
        except Exception as error:
            raise StageFailedError(f"a stage failed: {type(error).__name__}: {error}") from error

    def load_adapter(self, source: AdapterSource) -> None:
        """Has all stages read an adapter. Raises CheckpointError."""
        for runner in self._runners:
            runner.load_adapter(source)

    def close(self) -> None:
        """Waits for the plan being computed, and drops the plans queued after it."""
        self._thread.shutdown(cancel_futures=True)
        for runner in self._runners:
            runner.close()

    def _compute(self, plan: Plan) -> Result:
        output: StageOutput | Result | None = None
        timings = []
        for runner in self._runners:
            assert not isinstance(output, Result), "only the last stage gives a result"
            begin_ns = self._clock()
            output = runner.step(plan, output)
            timings.append(StageTiming(begin_ns, self._clock()))
        assert isinstance(output, Result), "the last stage gives a result"
        return replace(output, timings=tuple(timings))


def load_local(config: PipelineConfig) -> tuple[LoadedPipeline, tuple[StageRunner, ...]]:
    """Loads all stages on this machine's device, one after the other. The same thread must compute them later.

    Raises:
        ConfigurationError: the settings, the checkpoint or the device are not suitable.
    """
    blueprint = draw_blueprint(config)
    kinds = [local_device(choice)[0] for choice in config.devices]
    runners = tuple(StageRunner(spec) for spec in blueprint.stage_specs(kinds))
    devices = [runner.describe_device() for runner in runners]
    dtype = choose_dtype(config, blueprint.model, devices)
    require_memory(blueprint, dtype, devices)
    reports = tuple(runner.load(dtype, config.threads_per_stage) for runner in runners)
    num_blocks = count_kv_blocks(blueprint, reports)
    for runner in runners:
        runner.allocate(num_blocks)
    return LoadedPipeline(blueprint, reports, num_blocks), runners


def start_local(config: PipelineConfig) -> tuple[LoadedPipeline, LocalExecutor]:
    """Loads a pipeline on the thread that will compute it. The caller must close the executor.

    OpenMP keeps a team of threads for every thread that has ever computed. If two teams have more threads than there
    are cores, idle threads sleep instead of spinning, and each operator takes some 50 us longer.

    Raises:
        ConfigurationError: see `load_local`.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="stages")
    try:
        pipeline, runners = thread.submit(load_local, config).result()
    except Exception:
        thread.shutdown()
        raise
    return pipeline, LocalExecutor(runners, thread)
