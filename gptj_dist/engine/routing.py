"""Chooses the pipeline that computes a prompt, by what pipelines publish and what was sent to them since. Knows no Ray.

What counts is the time until the request has its tokens. A pipeline that holds the prompt's first blocks computes less
of it; one with many requests takes longer for each token. Requests of one session stay together unless that takes much
longer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gptj_dist.engine.prefix import can_begin_with_prefix, extend_keys
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.scheduler import Scheduler

MAX_KEYS = 4096
"""Blocks that a pipeline publishes: 65,536 tokens, those that were used last."""

SHORT_KEY_BYTES = 4
"""Of the keys that are published. If two are equal by chance, a request goes where it computes more."""

OVERLAP = 0.5
"""Share of a request's tokens that it computes beside another one, which may end before or begin later."""

NEAR = 1.1
"""Pipelines whose times differ by less than this factor are taken for equal: estimates are no better."""

STICKY = 3.0
"""A session stays with its pipeline while its request has all tokens there in this multiple of the shortest time."""

SENT_LIFETIME_S = 5.0
"""A request that a pipeline has not published after this time never got there."""


class Route(StrEnum):
    """Why a request went to its pipeline."""

    PREFIX = "prefix"
    """No other pipeline holds more of its first tokens."""
    LOAD = "load"
    """Another one holds more, but is busier than that saves."""
    NEW = "new"
    """No pipeline holds its first block."""
    SESSION = "session"
    """The others of its session go there."""


@dataclass(frozen=True, slots=True)
class RoutingFacts:
    """What a pipeline publishes.

    Args:
        keys: short keys of the blocks that it holds or is about to compute, one after the other.
        received: the number of the newest stream that it has received, by the endpoint of its inbox.
        computing: the streams that it computes now, by their inbox.
        down_s: seconds until the pipeline computes again; 0 while it does.
        wait_s: seconds from then until a request that arrives now can run.
        row_s: seconds for each row on its slowest stage; 0 if that is not known.
        num_requests: running and waiting ones.
        early_share: see `Pace`.
    """

    keys: bytes = b""
    received: Mapping[str, int] = field(default_factory=dict)
    computing: Mapping[str, Sequence[int]] = field(default_factory=dict)
    down_s: float = 0.0
    wait_s: float = 0.0
    row_s: float = 0.0
    num_requests: int = 0
    early_share: float = 0.0

    @classmethod
    def of(cls, scheduler: Scheduler, room_after_s: float, early_share: float) -> RoutingFacts:
        """The facts of the pipeline with this scheduler, but for what it has received.

        Args:
            room_after_s: seconds until the next new request can run.
        """
        return cls(
            keys=_shortened(scheduler.known_keys(MAX_KEYS)),
            wait_s=wait_s(scheduler, room_after_s),
            row_s=scheduler.step_cost.row_s,
            num_requests=scheduler.num_running + scheduler.num_waiting,
            early_share=early_share,
        )


def wait_s(scheduler: Scheduler, room_after_s: float) -> float:
    """Seconds until a request that arrives now can run.

    Args:
        room_after_s: seconds until the next new request can run.
    """
    num_turns = scheduler.num_waiting + 1 if scheduler.is_full else 1
    return max(num_turns * room_after_s, room_after_s + scheduler.waiting.num_tokens * scheduler.step_cost.row_s)


def expected_s(facts: RoutingFacts, num_rows: int, num_requests: int, num_tokens: int) -> float:
    """Seconds until a request has its tokens, without those that it takes on any pipeline.

    Args:
        num_rows: to be computed until its first token, besides those of the facts.
        num_requests: other requests that the pipeline computes.
        num_tokens: that the request generates at most.
    """
    if facts.early_share:
        num_tokens = min(num_tokens, round(1 / facts.early_share))
    return facts.down_s + facts.wait_s + facts.row_s * (num_rows + OVERLAP * num_tokens * num_requests)


Stream = tuple[str, int]
"""The endpoint of an inbox, and the number of a stream in it."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A call that was sent to a pipeline. It has no rows and requests any more once it has ended."""

    call: str
    keys: Sequence[int]
    num_rows: int
    num_requests: int
    sent_s: float


@dataclass(slots=True)
class _Known:
    """What is known of a pipeline.

    Attributes:
        keys: short keys of the blocks that it has published.
        sent: requests that were sent to it since, by their first stream.
        sent_keys: short keys of their blocks.
        calls: the streams of open calls.
        ended: streams that have ended, as far as its facts may still contain them.
        num_rows: that were sent to it, ever.
    """

    facts: RoutingFacts = RoutingFacts()
    keys: set[int] = field(default_factory=set)
    sent: dict[Stream, _Sent] = field(default_factory=dict)
    sent_keys: set[int] = field(default_factory=set)
    calls: dict[str, set[Stream]] = field(default_factory=dict)
    ended: set[Stream] = field(default_factory=set)
    num_rows: int = 0

    def take(self, facts: RoutingFacts) -> None:
        """Takes facts, unless they are the same again."""
        if facts == self.facts:
            return
        self.facts = facts
        self.keys = set(_numbers(facts.keys))
        new = {stream for stream in (*self.sent, *self.ended) if stream[1] > facts.received.get(stream[0], -1)}
        self.sent = {stream: sent for stream, sent in self.sent.items() if stream in new}
        self.ended &= new | {(inbox, number) for inbox, numbers in facts.computing.items() for number in numbers}
        self._gather_keys()

    def drop(self, stream: Stream, now_s: float) -> None:
        """Forgets a request that is sent elsewhere, and those that did not get there."""
        first = next(iter(self.sent.values()), None)
        is_lost = first is not None and now_s - first.sent_s >= SENT_LIFETIME_S
        if not is_lost and stream not in self.sent:
            return
        kept = {
            name: sent for name, sent in self.sent.items() if now_s - sent.sent_s < SENT_LIFETIME_S and name != stream
        }
        for sent in (sent for name, sent in self.sent.items() if name not in kept):
            self.calls.pop(sent.call, None)
        self.sent = kept
        self._gather_keys()

    def _gather_keys(self) -> None:
        self.sent_keys = {key for sent in self.sent.values() for key in sent.keys}

    def put(self, stream: Stream, new: _Sent) -> None:
        """Notes what is sent to it."""
        self.sent[stream] = new
        inbox, first = stream
        self.calls.setdefault(new.call, set()).update((inbox, first + choice) for choice in range(new.num_requests))
        self.sent_keys.update(new.keys)
        self.num_rows += new.num_rows

    def end(self, call: str) -> None:
        """A call has ended: what it computed is still there."""
        streams = self.calls.pop(call, set())
        self.ended |= streams
        for stream in streams & self.sent.keys():
            self.sent[stream] = replace(self.sent[stream], num_rows=0, num_requests=0)

    def num_cached(self, keys: Sequence[int]) -> int:
        """How many of the first blocks it holds."""
        for number, key in enumerate(keys):
            if key not in self.keys and key not in self.sent_keys:
                return number
        return len(keys)

    def expected_s(self, num_rows: int, num_tokens: int, usual_row_s: float) -> float:
        """See the function of this name. What has ended since the facts is taken off."""
        published = self.facts.num_requests
        num_ended = sum(number in self.facts.computing.get(inbox, ()) for inbox, number in self.ended)
        num_requests = max(0, published - num_ended)
        wait_s = self.facts.wait_s * (num_requests / published if published else 1)
        num_rows += sum(sent.num_rows for sent in self.sent.values())
        num_requests += sum(sent.num_requests for sent in self.sent.values())
        facts = replace(self.facts, wait_s=wait_s, row_s=self.facts.row_s or usual_row_s)
        return expected_s(facts, num_rows, num_requests, num_tokens)


class Router:
    """Chooses among the pipelines that there are.

    Args:
        block_size: tokens of a KV block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._known: dict[str, _Known] = {}
        self._usual_row_s = 1.0

    def meet(self, facts: Mapping[str, RoutingFacts | None]) -> None:
        """Takes the newest facts of all pipelines; None for one that has not published any."""
        self._usual_row_s = max((new.row_s for new in facts.values() if new is not None), default=0.0) or 1.0
        least = min((known.num_rows for name, known in self._known.items() if name in facts), default=0)
        self._known = {name: self._known.get(name) or _Known(num_rows=least) for name in facts}
        for name, known in self._known.items():
            known.take(facts[name] or RoutingFacts())

    def choose(
        self, names: Iterable[str], call: str, stream: Stream, records: Sequence[RequestRecord], now_s: float
    ) -> tuple[list[str], Route]:
        """The pipelines of these names, the best one first, and why. The call counts as sent there.

        Args:
            call: its name, for `end`.
            stream: of the first record.
            records: of one prompt.
            now_s: seconds, monotonic.
        """
        record, size = records[0], self._block_size
        pipelines = {name: self._known[name] for name in names}
        for known in pipelines.values():
            known.drop(stream, now_s)  # Serve chooses again if the last choice is gone
        tokens = (*record.prompt_ids, *record.token_ids)
        keys = _short_keys(record, tokens, size)
        findable = keys[: (len(tokens) - 1) // size]  # the last token is always computed
        cached = {name: size * known.num_cached(findable) for name, known in pipelines.items()}
        costs_s = {
            name: known.expected_s(len(tokens) - cached[name], record.params.max_tokens, self._usual_row_s)
            for name, known in pipelines.items()
        }
        near_s = NEAR * min(costs_s.values())

        def order(name: str) -> tuple[float, int, int]:
            is_near = costs_s[name] <= near_s
            return (0.0, -cached[name], pipelines[name].num_rows) if is_near else (costs_s[name], 0, 0)

        best, *others = ranked = sorted(pipelines, key=order)
        if record.session is not None:
            home = _home(record.session, pipelines)
            own_s = self._usual_row_s * record.params.max_tokens
            if costs_s[home] + own_s <= STICKY * (min(costs_s.values()) + own_s):
                best, others = home, [name for name in ranked if name != home]
        pipelines[best].put(stream, _Sent(call, keys, len(tokens) - cached[best], len(records), now_s))
        most = max(cached.values())
        route = Route.NEW if not most else Route.PREFIX if cached[best] == most else Route.LOAD
        return [best, *others], Route.SESSION if best != ranked[0] else route

    def end(self, name: str, call: str) -> None:
        """A call of a pipeline has ended."""
        if (known := self._known.get(name)) is not None:
            known.end(call)


def _home(session: str, names: Iterable[str]) -> str:
    """The pipeline of a session: that with the highest hash together with it.

    All ingresses find the same one and keep no list. When a pipeline comes or goes, only the sessions that go to it or
    were there change theirs.
    """
    return max(names, key=lambda name: hashlib.blake2b(f"{name}\0{session}".encode(), digest_size=8).digest())


def _short_keys(record: RequestRecord, tokens: Sequence[int], block_size: int) -> list[int]:
    """Of all whole blocks of a request."""
    keys: list[bytes] = []
    if can_begin_with_prefix(record.params):
        extend_keys(keys, record.params, tokens, block_size, len(tokens) // block_size)
    return _numbers(_shortened(keys))


def _shortened(keys: Iterable[bytes]) -> bytes:
    return b"".join(key[:SHORT_KEY_BYTES] for key in keys)


def _numbers(short_keys: bytes) -> list[int]:
    return memoryview(short_keys).cast("I").tolist()
