"""Our engine: with one stage in this process, with more as actors on a local Ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import gptj_dist
from benchmarks.workers.worker import GenerationWorker, Worker
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.params import SamplingParams
from gptj_dist.stages.blueprint import LoadedPipeline
from gptj_dist.stages.local import start_local


def open_worker(settings: dict[str, Any]) -> Worker:
    """Loads the model. `settings` are fields of `PipelineConfig`.

    As in other engines' workers, no prompt is cached and no token is guessed unless the settings say so.
    """
    if "layers" in settings:
        settings["layers"] = tuple(settings["layers"])
    known = {field.name for field in fields(PipelineConfig)}  # of an older checkout fewer
    plain: dict[str, Any] = {name: False for name in ("prefix_cache", "speculation") if name in known}
    return GenerationWorker(OurEngine(PipelineConfig(**{**plain, **settings})))


class OurEngine:
    """Our `AsyncEngine`, on an event loop that runs only while it generates."""

    def __init__(self, config: PipelineConfig) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        opening = _local(config) if config.num_stages == 1 else _actors(config)
        self._engine, self._pipeline = self._runner.run(self._stack.enter_async_context(opening))

    def about(self) -> dict[str, Any]:
        return {
            "engine": "gptj_dist",
            "package": str(Path(gptj_dist.__file__).parent),
            "dtype": self._pipeline.reports[0].dtype,
            "layers": [report.layers.num_layers for report in self._pipeline.reports],
            "kv_tokens": self._pipeline.num_kv_tokens,
        }

    def stage_pids(self) -> list[int]:
        return [report.pid for report in self._pipeline.reports]

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        return self._runner.run(self._generate_all(prompts, params))

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    async def _generate_all(self, prompts: list[list[int]], params: SamplingParams) -> int:
        return sum(await asyncio.gather(*(self._generate_one(prompt, params) for prompt in prompts)))

    async def _generate_one(self, prompt: list[int], params: SamplingParams) -> int:
        async with aclosing(self._engine.generate(prompt, params)) as deltas:
            return sum([len(delta.token_ids) async for delta in deltas])


@asynccontextmanager
async def _local(config: PipelineConfig) -> AsyncIterator[tuple[AsyncEngine, LoadedPipeline]]:
    pipeline, executor = start_local(config)
    engine = AsyncEngine(pipeline.make_scheduler(), executor, pipeline.limits())
    async with _driven(engine):
        yield engine, pipeline
    executor.close()


@asynccontextmanager
async def _actors(config: PipelineConfig) -> AsyncIterator[tuple[AsyncEngine, LoadedPipeline]]:
    # Here, so that a checkout of another layout can be measured with one stage.
    from gptj_dist.operate.launch.environment import LOCAL_RAY_ENVIRONMENT

    os.environ.update(LOCAL_RAY_ENVIRONMENT)  # before ray is imported
    from benchmarks.workers.actors import start_actors

    async with start_actors(config) as (group, pipeline):
        engine = AsyncEngine(pipeline.make_scheduler(), group, pipeline.limits())
        async with _driven(engine):
            yield engine, pipeline


@asynccontextmanager
async def _driven(engine: AsyncEngine) -> AsyncIterator[None]:
    driver = asyncio.create_task(engine.run())
    try:
        yield
    finally:
        driver.cancel()
        await asyncio.gather(driver, return_exceptions=True)
