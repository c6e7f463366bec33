"""The form of OpenAI's completions and chat: choices, each by a writer of its endpoint, and the numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gptj_dist.answers.completion import TextDelta, TokenCounts
from gptj_dist.answers.error_responses import error_response
from gptj_dist.answers.schema.sampling import ChoiceFields
from gptj_dist.answers.sse import SSE_DONE, sse_frame
from gptj_dist.json_types import JsonObject


class Writer(Protocol):
    """Writes one choice in an endpoint's shape."""

    @property
    def num_prompt_tokens(self) -> int:
        """Of the prompt that the choice continues."""

    def piece(self, delta: TextDelta) -> JsonObject | None:
        """The choice's next piece; None if it would say nothing."""

    def whole(self, delta: TextDelta) -> JsonObject:
        """The choice, all at once."""


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that every response and event of one HTTP request begins with.

    Args:
        created: seconds since 1970.
        kind, chunk_kind: the `object` of a response, and of an event.
    """

    id: str
    created: int
    model: str
    kind: str
    chunk_kind: str

    def of(self, kind: str) -> JsonObject:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChoicesForm:
    """A `Form` of choices.

    Args:
        writers: one for each choice, `request.n` for each prompt.
        num_prompt_tokens: of all prompts; each counts once, whatever n is.
        num_prediction_tokens: of the request's prediction.
    """

    def __init__(
        self,
        request: ChoiceFields,
        head: Head,
        writers: Sequence[Writer],
        num_prompt_tokens: int,
        num_prediction_tokens: int,
    ) -> None:
        options = request.stream_options
        self._has_usage = options is not None and options.include_usage
        self._has_usage_so_far = options is not None and options.continuous_usage_stats
        self._head = head
        self._writers = writers
        self._num_prompt_tokens = num_prompt_tokens
        self._num_prediction_tokens = None if request.prediction is None else num_prediction_tokens
        self._counts = [TokenCounts()] * len(writers)

    def whole(self, completions: Iterator[TextDelta], counts: TokenCounts) -> JsonObject:
        """The response: all choices, each made when it is written, and their numbers of tokens."""
        choices = (writer.whole(completion) for writer, completion in zip(self._writers, completions, strict=True))
        usage = self._usage(self._num_prompt_tokens, counts)
        return {**self._head.of(self._head.kind), "choices": choices, "usage": usage, "metrics": _metrics(counts)}

    def event(self, index: int, delta: TextDelta) -> bytes:
        """A chunk of one choice; its usage so far, if wanted, is that of the choice."""
        writer = self._writers[index]
        self._counts[index] = self._counts[index].plus(delta)
        piece = writer.piece(delta)
        if piece is None:
            return b""
        chunk = {**self._head.of(self._head.chunk_kind), "choices": [piece]}
        if self._has_usage_so_far:
            chunk["usage"] = self._usage(writer.num_prompt_tokens, self._counts[index], 1)
        elif self._has_usage:
            chunk["usage"] = None
        return sse_frame(chunk)

    def end(self, counts: TokenCounts) -> bytes:
        """The usage of the whole request and how it was computed, if wanted, and `[DONE]`."""
        if not self._has_usage:
            return SSE_DONE
        usage = self._usage(self._num_prompt_tokens, counts)
        head = self._head.of(self._head.chunk_kind)
        return sse_frame({**head, "choices": [], "usage": usage, "metrics": _metrics(counts)}) + SSE_DONE

    def failure(self, error: Exception) -> bytes:
        """The error; no `[DONE]` follows."""
        return sse_frame(error_response(error)[1])

    def renumber(self, num_events: int) -> None:
        """Events of choices have no numbers."""

    def _usage(self, prompt_tokens: int, counts: TokenCounts, num_choices: int | None = None) -> JsonObject:
        """The numbers of tokens of some choices, by default of all."""
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": counts.output,
            "total_tokens": prompt_tokens + counts.output,
            "prompt_tokens_details": {"cached_tokens": counts.cached},
        }
        if self._num_prediction_tokens is not None:
            num_predicted = self._num_prediction_tokens * (num_choices or len(self._writers))
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": counts.foretold,
                "rejected_prediction_tokens": max(0, num_predicted - counts.foretold),
            }
        return usage


def _metrics(counts: TokenCounts) -> JsonObject:
    """How the tokens were computed, which differs from one time to the next. So it is no part of the usage."""
    return {"drafted_tokens": counts.drafted}
