"""A model served in this process: the service of answers without HTTP and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.service import AnswerService
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.errors import NotReadyError, StageFailedError
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.blueprint import LoadedPipeline
from gptj_dist.stages.local import LocalExecutor, start_local


class EngineSource:
    """A `TokenSource` whose tokens come from an engine on this event loop."""

    def __init__(self, engine: AsyncEngine, limits: EngineLimits) -> None:
        self._engine = engine
        self._limits = limits

    def limits(self) -> EngineLimits:
        """The limits of the engine."""
        return self._limits

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        """Completions of one prompt, made by the engine."""
        return self._engine.generate_all(records)


@asynccontextmanager
async def running_engine(pipeline: LoadedPipeline, executor: LocalExecutor) -> AsyncIterator[AsyncEngine]:
    """An engine that makes tokens while the context lasts. Its streams end with the context, and the executor closes.

    Args:
        pipeline: what the executor has loaded.
    """
    engine = AsyncEngine(pipeline.make_scheduler(), executor, pipeline.limits())

    def note_end(error: Exception) -> None:
        engine.fail(StageFailedError(f"the model can no longer be used: {error}"))

    driver = run_in_background("driver of the engine", engine.run(), note_end)
    try:
        yield engine
    finally:
        driver.cancel()
        engine.fail(NotReadyError("the model has been closed"))
        await asyncio.gather(driver, return_exceptions=True)
        executor.close()


@asynccontextmanager
async def serve_in_process(
    config: PipelineConfig,
    names: tuple[str, ...],
    chat_template: str | None,
    chat: ChatDefaults = ChatDefaults(),  # noqa: B008  # frozen
) -> AsyncIterator[AnswerService]:
    """Loads the model, and answers requests for it while the context lasts.

    Args:
        names: what requests may call the model.
        chat_template: Jinja, in place of the checkpoint's.
        chat: for conversations whose requests leave it out.

    Raises:
        ConfigurationError: the settings or the checkpoint are invalid.
    """
    pipeline, executor = start_local(config)
    async with running_engine(pipeline, executor) as engine:
        model = ServedModel.load(pipeline.blueprint.config, names, chat_template, chat)
        yield AnswerService(model, EngineSource(engine, pipeline.limits()))
