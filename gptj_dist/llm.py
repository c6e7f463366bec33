"""The offline face: prompts in, completions out, in one process and without Ray."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from gptj_dist.answers.completion import TextDelta, stream_text, whole
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.config import PipelineConfig, refuse_unknown_keys
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.request import FinishReason
from gptj_dist.engine.stats import PlanRecord
from gptj_dist.errors import InvalidRequestError, NotReadyError
from gptj_dist.params import Pooling, PoolingKind, SamplingParams, TokenLogprobs
from gptj_dist.stages.blueprint import LoadedPipeline
from gptj_dist.stages.local import start_local
from gptj_dist.stages.trace import TraceFile, TracePart
from gptj_dist.text.tokenizer import Tokenizer

T = TypeVar("T")
PromptInput = str | Sequence[int]

_CLOSED = "the LLM has been closed"


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt.

    Args:
        text: what was generated; a stop string and what follows it are cut.
        token_ids: the tokens behind the text, end of text or a stop string's included.
        logprobs: of each token, if `params.logprobs` asks for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What became of one prompt: `params.n` completions.

    Args:
        prompt_logprobs: of the prompt's tokens from the second on, if `params.prompt_logprobs` asks for them.
    """

    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text


class LLM:
    """A GPT-J and its engine in this process.

    Args:
        model: `demo`, a directory in the Hugging Face layout, or a hub name.
        settings: fields of `PipelineConfig`, such as `stages=2` or `dtype="float32"`.

    Raises:
        ConfigurationError: the settings or the checkpoint will not do.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        refuse_unknown_keys(settings, [field.name for field in fields(PipelineConfig)])
        config = PipelineConfig(model, **settings)
        self.pipeline: LoadedPipeline
        self.pipeline, self._executor = start_local(config)
        self.tokenizer = Tokenizer.load(resolve_model(config.model, self.pipeline.blueprint.config.revision))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gptj-dist-llm", daemon=True)
        self._thread.start()
        self._engine = AsyncEngine(self.pipeline.make_scheduler(), self._executor, self.pipeline.limits())
        self._driver = self._run(self._start())

    def generate(
        self, prompts: PromptInput | Sequence[PromptInput], params: SamplingParams | None = None
    ) -> list[Output]:
        """Completes prompts, all at once.

        Args:
            prompts: a text, a list of token ids, or a list of either.

        Raises:
            InvalidRequestError: a prompt does not fit; none of them is completed.
        """
        params = params or SamplingParams()
        prompt_ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        return self._run(self._complete_all(prompt_ids, params))

    def embed(
        self, prompts: PromptInput | Sequence[PromptInput], pooling: PoolingKind = "mean", layer: int | None = None
    ) -> list[tuple[float, ...]]:
        """Embeddings of prompts, each `d_model` float32 numbers: hidden states of the model.

        Args:
            prompts: as `generate` takes them.
            pooling, layer: as `Pooling` has them.

        Raises:
            InvalidRequestError: a prompt or the layer does not fit.
        """
        params = SamplingParams(max_tokens=0, pooling=Pooling(pooling, layer))
        prompt_ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        return self._run(self._embed_all(prompt_ids, params))

    def stream(self, prompt: PromptInput, params: SamplingParams | None = None) -> Iterator[str]:
        """Completes one prompt once, yielding its text as it comes. Closing the iterator cancels."""
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        pouring = self._submit(self._pour(self._encode(prompt), params or SamplingParams(), pieces))
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            pouring.cancel()

    def write_trace(self, path: str | Path) -> None:
        """Writes when each stage computed what, of the last few thousand steps, for https://ui.perfetto.dev.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        with TraceFile(Path(path)) as trace:
            layers = self.pipeline.blueprint.layers
            trace.append([TracePart("in one process", layers, self._run(self._records()))])

    def close(self) -> None:
        """Ends the engine, its streams and its threads. A second call does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._executor.close()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: PromptInput) -> list[int]:
        if not isinstance(prompt, str) and not all(type(token_id) is int for token_id in prompt):
            raise InvalidRequestError("a prompt is a text or a list of token ids, which are whole numbers", "prompt")
        return self.tokenizer.encode_prompt(prompt, self.pipeline.blueprint.model.eos_token_id)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = self._submit(coroutine)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop.is_closed():
            coroutine.close()
            raise NotReadyError(_CLOSED)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _complete_all(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Output]:
        streams = [self._engine.generate_all(prompt_ids, params, range(params.n)) for prompt_ids in prompts]
        return await asyncio.gather(*(self._complete(*pair, params) for pair in zip(prompts, streams, strict=True)))

    async def _embed_all(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[tuple[float, ...]]:
        streams = [self._engine.generate(prompt_ids, params) for prompt_ids in prompts]
        return await asyncio.gather(*map(self._embed, streams))

    async def _embed(self, stream: AsyncGenerator[Delta, None]) -> tuple[float, ...]:
        [delta] = [delta async for delta in stream]
        assert delta.embedding is not None, "it was asked for"
        return tuple(array("f", delta.embedding))

    async def _complete(
        self, prompt_ids: list[int], streams: Sequence[AsyncGenerator[Delta, None]], params: SamplingParams
    ) -> Output:
        wholes = await asyncio.gather(*(self._whole(stream, params) for stream in streams))
        return Output(tuple(prompt_ids), tuple(map(_completion, wholes)), wholes[0].prompt_logprobs)

    async def _whole(self, stream: AsyncGenerator[Delta, None], params: SamplingParams) -> TextDelta:
        return whole([delta async for delta in stream_text(stream, self.tokenizer, params)])

    async def _pour(
        self, prompt_ids: list[int], params: SamplingParams, pieces: SimpleQueue[str | BaseException | None]
    ) -> None:
        try:
            stream = self._engine.generate(prompt_ids, params)
            async with aclosing(stream_text(stream, self.tokenizer, params)) as deltas:
                async for delta in deltas:
                    pieces.put(delta.text)
        except Exception as error:  # whatever it is, the reader must not take the text for complete
            pieces.put(error)
        finally:
            pieces.put(None)

    async def _start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._engine.run())

    async def _records(self) -> tuple[PlanRecord, ...]:
        return self._engine.stats.records()

    async def _shut_down(self) -> None:
        self._driver.cancel()
        self._engine.fail(NotReadyError(_CLOSED))
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


def _completion(all_: TextDelta) -> Completion:
    assert all_.finish_reason is not None, "a stream ends with a reason"
    return Completion(all_.text, all_.token_ids, all_.finish_reason, all_.logprobs)


def _as_list(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    if isinstance(prompts, str):
        return [prompts]
    ids = [item for item in prompts if isinstance(item, int)]
    if not ids:
        return [item for item in prompts if not isinstance(item, int)]
    if len(ids) < len(prompts):
        raise InvalidRequestError("prompts mixes token ids with prompts", "prompt")
    return [ids]
