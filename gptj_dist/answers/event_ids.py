"""The ids of a stream's events: each says what a client has received by then. Knows no HTTP.

An id is `12:7,5e,9`: 12 events, 7 tokens of the first completion, all 5 of the second, which has ended, 9 of the third.
It does not depend on how many tokens came with each event. `12+2:7>24` is 2 events later, of several that came together
with the tokens up to the 24th; `12+2:7e` is 2 events later, of those after the last token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gptj_dist.answers.answer import Form
from gptj_dist.answers.completion import TextDelta, TokenCounts
from gptj_dist.errors import InvalidRequestError, excerpt
from gptj_dist.json_types import JsonObject

_COMPLETION = r"\d{1,9}e?(?:>\d{1,9}e?)?"
_ID = re.compile(rf"(\d{{1,9}})(?:\+(\d{{1,3}}))?:({_COMPLETION}(?:,{_COMPLETION}){{0,1023}})")
_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Received:
    """What a client has received of one completion.

    Args:
        has_end: it knows that nothing follows.
        partly: as far as the events go that came together and of which it has only the first; None if there are none.
    """

    num_tokens: int = 0
    has_end: bool = False
    partly: Received | None = None

    @staticmethod
    def parsed(text: str) -> Received:
        """As it stands in an id."""
        whole, _, partly = text.partition(">")
        num_tokens, has_end = int(whole.removesuffix("e")), whole.endswith("e")
        return Received(num_tokens, has_end, Received.parsed(partly) if partly else None)

    def __str__(self) -> str:
        return f"{self.num_tokens}{'e' * self.has_end}{'' if self.partly is None else f'>{self.partly}'}"


@dataclass(frozen=True, slots=True)
class EventId:
    """What a client has received of a stream.

    Args:
        num_events: up to the last that had new tokens.
        num_more: events after that.
        completions: by their index.
    """

    num_events: int
    num_more: int
    completions: tuple[Received, ...]

    @staticmethod
    def parsed(text: str, num_completions: int) -> EventId:
        """Raises InvalidRequestError if it is not the id of an event of a stream with that number of completions."""
        match = _ID.fullmatch(text)
        ends = match[3].split(",") if match else ()
        if match is None or len(ends) != num_completions:
            raise InvalidRequestError(f"Last-Event-ID {excerpt(text)} is not the id of an event of this stream")
        return EventId(int(match[1]), int(match[2] or 0), tuple(map(Received.parsed, ends)))

    @staticmethod
    def none(num_completions: int) -> EventId:
        """Of a client that has received nothing."""
        return EventId(0, 0, (Received(),) * num_completions)


class ResumableForm:
    """A `Form` whose events have ids, and which leaves out what the client has received.

    The first piece of each completion must have the tokens that were received, if there are any.
    """

    def __init__(self, form: Form, received: EventId) -> None:
        self._form = form
        self._received = received.completions
        self._num_events = received.num_events
        self._num_more, self._num_skipped = 0, received.num_more
        self._num_tokens = [0] * len(received.completions)
        self._ends = [replace(of, partly=None) for of in received.completions]

    def whole(self, completions: Iterator[TextDelta], counts: TokenCounts) -> JsonObject:
        """As the form's."""
        return self._form.whole(completions, counts)

    def event(self, index: int, delta: TextDelta) -> bytes:
        """As the form's, with ids. The last event has the id that says that the piece was received."""
        frames = self._form.event(index, delta)
        received = self._received[index]
        self._num_tokens[index] += len(delta.token_ids)
        if received.has_end or (self._num_tokens[index] <= received.num_tokens and delta.finish_reason is None):
            self.renumber(self._num_events)
            return b""
        *more, last = frames.split(_END)[:-1] or [b""]
        end = Received(self._num_tokens[index], has_end=delta.finish_reason is not None)
        self._ends[index] = replace(self._ends[index], partly=end)
        written = b"".join(map(self._more, more))
        self._ends[index] = end
        if not last:
            return b""
        self._num_events += self._num_more + 1
        self._num_more = self._num_skipped = 0
        return written + self._with_id(last, 0)

    def end(self, counts: TokenCounts) -> bytes:
        """As the form's, with ids."""
        return b"".join(map(self._more, self._form.end(counts).split(_END)[:-1]))

    def failure(self, error: Exception) -> bytes:
        """As the form's. With its id a client may ask for what the failure kept from it."""
        event, _, _ = self._form.failure(error).partition(_END)
        return self._with_id(event, max(self._num_more, self._num_skipped))

    def renumber(self, num_events: int) -> None:
        """As the form's."""
        self._form.renumber(num_events)

    def _more(self, event: bytes) -> bytes:
        self._num_more += 1
        return b"" if self._num_more <= self._num_skipped else self._with_id(event, self._num_more)

    def _with_id(self, event: bytes, num_more: int) -> bytes:
        more = f"+{num_more}" if num_more else ""
        return f"id: {self._num_events}{more}:{','.join(map(str, self._ends))}\n".encode("ascii") + event + _END
