"""Gets whole completions and embeddings out of an engine. Runs on the engine's event loop."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from queue import SimpleQueue

from gptj_dist.answers.beams import choices
from gptj_dist.answers.completion import TextDelta, stream_text, whole
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import new_records
from gptj_dist.llm.outputs import Completion, Output
from gptj_dist.llm.progress import Meter
from gptj_dist.params import SamplingParams
from gptj_dist.text.tokenizer import Tokenizer

TokenIds = Sequence[int]


class Completer:
    """Completes prompts of token ids.

    Args:
        engine: runs on the same event loop.
        tokenizer: of its model.
    """

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    async def complete_all(
        self, prompts: Sequence[TokenIds], params: Sequence[SamplingParams], meter: Meter
    ) -> list[Output]:
        """Completes all prompts at once, each by its parameters.

        Raises:
            InvalidRequestError: one of them cannot be served; none is completed.
        """
        streams = [
            choices(self._engine.generate_all(new_records(prompt, settings, settings.n)), settings)
            for prompt, settings in zip(prompts, params, strict=True)
        ]
        return await asyncio.gather(
            *(self._complete(*each, meter) for each in zip(prompts, streams, params, strict=True))
        )

    async def embed_all(self, prompts: Sequence[TokenIds], params: SamplingParams) -> list[tuple[float, ...]]:
        """The embeddings of all prompts.

        Raises:
            InvalidRequestError: one of them cannot be served; none is embedded.
        """
        streams = [self._engine.generate(prompt, params) for prompt in prompts]
        return await asyncio.gather(*map(_embedding, streams))

    async def pour(
        self, prompt: TokenIds, params: SamplingParams, pieces: SimpleQueue[str | BaseException | None]
    ) -> None:
        """Puts the text of one completion into a queue as it comes; an error, if there is one, and None end it."""
        try:
            stream = self._engine.generate(prompt, params)
            async with aclosing(stream_text(stream, self._tokenizer, params)) as deltas:
                async for delta in deltas:
                    pieces.put(delta.text)
        except Exception as error:  # of any kind: without it the reader would take the text for complete
            pieces.put(error)
        finally:
            pieces.put(None)

    async def _complete(
        self, prompt: TokenIds, streams: Sequence[AsyncGenerator[Delta, None]], params: SamplingParams, meter: Meter
    ) -> Output:
        wholes = await asyncio.gather(*(self._whole(stream, params, meter) for stream in streams))
        meter.num_done += 1
        num_cached_tokens = sum(each.num_cached_tokens for each in wholes)
        return Output(tuple(prompt), tuple(map(_completion, wholes)), wholes[0].prompt_logprobs, num_cached_tokens)

    async def _whole(self, stream: AsyncGenerator[Delta, None], params: SamplingParams, meter: Meter) -> TextDelta:
        deltas = []
        async for delta in stream_text(stream, self._tokenizer, params):
            deltas.append(delta)
            meter.num_tokens += len(delta.token_ids)
        return whole(deltas)


async def _embedding(stream: AsyncGenerator[Delta, None]) -> tuple[float, ...]:
    [delta] = [delta async for delta in stream]
    assert delta.embedding is not None, "it was asked for"
    return tuple(array("f", delta.embedding))


def _completion(delta: TextDelta) -> Completion:
    assert delta.finish_reason is not None, "a stream ends with a reason"
    return Completion(delta.text, delta.token_ids, delta.finish_reason, delta.logprobs, delta.score)
