"""Turns streams of the engine's tokens into streams of text. Independent of HTTP and Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from gptj_dist.engine.drafts import Foretelling
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.request import FinishReason
from gptj_dist.params import SamplingParams, TokenLogprobs
from gptj_dist.text.output import TextOutput
from gptj_dist.text.stop_strings import StopPattern, prepare_stops
from gptj_dist.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a completion.

    Args:
        text: may be empty, while a character or a stop string is incomplete.
        token_ids: the tokens that came; those after the one that completed a stop string are left out.
        finish_reason: comes with the last.
        logprobs: of each token, if asked for.
        prompt_logprobs: of the prompt's tokens from the second on, with the first delta, if asked for.
        num_cached_tokens: see `Delta`.
        num_foretold: of `token_ids`, see `Foretelling`.
        score: of a text that a beam search has found, see `Beam`.
        num_drafted: see `Delta`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    num_foretold: int = 0
    score: float | None = None
    num_drafted: int = 0


class TokenCounts(NamedTuple):
    """Numbers of tokens of all completions of a request so far.

    Args:
        output: generated ones.
        cached: of the prompts, whose KV was there before.
        foretold: generated ones that the request's prediction has foretold.
        drafted: generated ones that were guessed, from whatever text, and so took no steps of their own.
    """

    output: int = 0
    cached: int = 0
    foretold: int = 0
    drafted: int = 0

    def plus(self, delta: TextDelta) -> TokenCounts:
        """With those of a completion's next piece."""
        return TokenCounts(
            self.output + len(delta.token_ids),
            self.cached + delta.num_cached_tokens,
            self.foretold + delta.num_foretold,
            self.drafted + delta.num_drafted,
        )


async def stream_text(
    deltas: AsyncGenerator[Delta, None],
    tokenizer: Tokenizer,
    params: SamplingParams,
    stops: Sequence[StopPattern] | None = None,
    prediction_ids: Sequence[int] = (),
) -> AsyncGenerator[TextDelta, None]:
    """Yields the text of `deltas`, and closes them as soon as a stop string is complete.

    Args:
        stops: those of `params`, if several completions share them.
        prediction_ids: tokens that the client expects.
    """
    foretelling = Foretelling(prediction_ids)
    output = TextOutput(
        tokenizer,
        prepare_stops(params.stop) if stops is None else stops,
        params.min_tokens,
        params.include_stop_str_in_output,
        params.skip_special_tokens,
    )
    async with aclosing(deltas):
        async for delta in deltas:
            num_before = output.num_tokens
            text, is_stopped = output.push(
                delta.token_ids, delta.finish_reason is not None, delta.finish_reason == FinishReason.STOP
            )
            num_new = output.num_tokens - num_before
            yield TextDelta(
                text,
                delta.token_ids[:num_new],
                FinishReason.STOP if is_stopped else delta.finish_reason,
                delta.logprobs[:num_new],
                delta.prompt_logprobs,
                delta.num_cached_tokens,
                foretelling.count(delta.token_ids[:num_new]),
                delta.beams[0].score if delta.beams else None,
                min(delta.num_drafted, num_new),
            )
            if is_stopped:
                return


def whole(deltas: Sequence[TextDelta]) -> TextDelta:
    """All of a completion's deltas as one."""
    return TextDelta(
        "".join(delta.text for delta in deltas),
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        deltas[-1].finish_reason,
        tuple(token for delta in deltas for token in delta.logprobs),
        deltas[0].prompt_logprobs,
        deltas[0].num_cached_tokens,
        sum(delta.num_foretold for delta in deltas),
        deltas[0].score,
        sum(delta.num_drafted for delta in deltas),
    )
