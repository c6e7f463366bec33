"""From a stream of tokens to a stream of text: where the engine meets the tokenizer. Knows neither HTTP nor Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.request import FinishReason
from gptj_dist.params import SamplingParams
from gptj_dist.text.output import TextOutput
from gptj_dist.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a completion.

    Args:
        text: may be empty, while a character or a stop string is incomplete.
        token_ids: the tokens that came; those after the one that completed a stop string are left out.
        finish_reason: comes with the last.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


async def stream_text(
    deltas: AsyncGenerator[Delta, None], tokenizer: Tokenizer, params: SamplingParams
) -> AsyncGenerator[TextDelta, None]:
    """Yields the text of `deltas`, and closes them as soon as a stop string is complete."""
    output = TextOutput(tokenizer, params.stop, params.min_tokens)
    async with aclosing(deltas):
        async for delta in deltas:
            num_before = output.num_tokens
            text, is_stopped = output.push(delta.token_ids, delta.finish_reason is not None)
            token_ids = delta.token_ids[: output.num_tokens - num_before]
            yield TextDelta(text, token_ids, FinishReason.STOP if is_stopped else delta.finish_reason)
            if is_stopped:
                return
