"""The scheduler's state of a request, and of the prompt that several requests may share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import InitVar, dataclass, field
from enum import StrEnum

from gptj_dist.engine.beams import Beam, BeamSearch
from gptj_dist.engine.drafts import Drafter
from gptj_dist.engine.plan import KVPrefix, NewRequest, PromptLogprobs
from gptj_dist.params import BROKEN_TOKEN, COMPLETE_TOKEN, NO_TOKEN, Continuation, SamplingParams, TokenLogprobs


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"
    ERROR = "error"
    """Its stream ends with an error instead."""


def finish_reason(beam: Beam | None) -> FinishReason:
    """Why a text that a beam search has found ended; None stands for one that is missing, as too much was ruled out."""
    if beam is None:
        return FinishReason.CONTENT_FILTER
    return FinishReason.STOP if beam.has_stopped else FinishReason.LENGTH


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt, and the state that the requests with this prompt share. Only their noise differs.

    Args:
        token_ids: one or more.
        can_share: whether one request may compute the prompt's KV for all. False if each needs the hidden states of
            every token.

    Attributes:
        first: the first request of the prompt.
        holders: the running requests, which hold the prompt's KV or compute it; empty if it cannot be shared.
        logprobs: log probabilities of its tokens from the second on, if requested.
    """

    token_ids: tuple[int, ...]
    can_share: bool = True
    first: Request | None = field(init=False, default=None)
    holders: list[Request] = field(init=False, default_factory=list)
    logprobs: list[TokenLogprobs] = field(init=False, default_factory=list)

    @property
    def num_shareable(self) -> int:
        """Tokens whose KV can be taken over. Each request computes the last token itself, to sample from its logits."""
        return len(self.token_ids) - 1 if self.can_share else 0

    def add_logprobs(self, new: PromptLogprobs) -> None:
        """Adds those that are not known yet. Some may come again, from another request or after a preemption."""
        self.logprobs += new.tokens[len(self.logprobs) + 1 - new.start :]


@dataclass(slots=True, eq=False)
class Request:
    """A request and its progress.

    Args:
        request_id: unique, and larger for a later arrival; a beam search takes as many as it has beams, from here on.
        prompt: its prompt, which other requests may share.
        params: its parameters; a request is one completion, whatever `params.n` is.
        noise_key: 64 bits that determine all of the request's sampling noise.
        log_id: its name in logs; None for one that is neither logged nor counted.
        is_moved: see `RequestRecord.is_accepted`.
        key: see `RequestRecord`.
        prediction_ids: see `RequestRecord`.
        generated: tokens that were generated before, by another scheduler.

    Attributes:
        place: its place among the requests of all keys, see `FairShares`.
        token_ids: the prompt and the tokens generated so far.
        num_computed: tokens whose keys and values are computed, or will be by plans in flight.
        blocks: KV blocks held, in order of position.
        block_keys: of its first whole blocks, as far as they were asked for (`engine/prefix.py`).
        num_cached_tokens: tokens whose KV earlier requests had left when it first ran.
        is_running: whether it is among the requests that plans are made of; False while it waits.
        has_run: whether it is or was among them, on any stages of this pipeline.
        is_awaiting_token: whether a plan in flight samples its next token.
        group: the beam search of which it is a beam; None if it is none.
        source: the beam from which it takes over its KV in the next plan that has it; no stage knows it before.
        drafter: guesses its next tokens; None before it first does.
    """

    request_id: int
    prompt: Prompt
    params: SamplingParams
    noise_key: int
    log_id: str | None = None
    is_moved: bool = False
    key: str | None = None
    prediction_ids: tuple[int, ...] = ()
    generated: InitVar[tuple[int, ...]] = ()
    place: int = field(init=False, default=0)
    token_ids: list[int] = field(init=False)
    num_computed: int = field(init=False, default=0)
    blocks: list[int] = field(init=False, default_factory=list)
    block_keys: list[bytes] = field(init=False, default_factory=list)
    num_cached_tokens: int = field(init=False, default=0)
    is_running: bool = field(init=False, default=False)
    has_run: bool = field(init=False, default=False)
    is_awaiting_token: bool = field(init=False, default=False)
    group: BeamGroup | None = field(init=False, default=None)
    source: Request | None = field(init=False, default=None)
    drafter: Drafter | None = field(init=False, default=None)

    def __post_init__(self, generated: tuple[int, ...]) -> None:
        self.token_ids = [*self.prompt.token_ids, *generated]
        if self.prompt.first is None:
            self.prompt.first = self

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether no more than one token is to be computed."""
        return len(self.token_ids) - self.num_computed <= 1 or self.source is not None

    @property
    def leader(self) -> Request:
        """The request that asked for the beam search of which this is a beam; else the request itself."""
        return self if self.group is None else self.group.leader

    @property
    def beams(self) -> Sequence[Request]:
        """The running beams of its search; else the request itself."""
        return (self,) if self.group is None else self.group.beams

    @property
    def num_expected(self) -> int:
        """Estimate of the tokens to compute: requests that are not the first of their prompt take over its KV."""
        return self.num_uncomputed - (0 if self.prompt.first is self else self.prompt.num_shareable)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt.token_ids)

    def append(self, token_id: int, eos_token_ids: Collection[int]) -> FinishReason | None:
        """Adds a sampled token; returns the reason if it ends the request.

        Args:
            token_id: `NO_TOKEN`, `BROKEN_TOKEN` and `COMPLETE_TOKEN` end the request before `max_tokens`.
        """
        self.is_awaiting_token = False
        if token_id == BROKEN_TOKEN:
            return FinishReason.ERROR
        if self.params.max_tokens == 0:
            return FinishReason.LENGTH
        if token_id == NO_TOKEN:
            return FinishReason.CONTENT_FILTER
        if token_id == COMPLETE_TOKEN:
            return FinishReason.STOP
        self.token_ids.append(token_id)
        if token_id in self.params.stop_token_ids or (token_id in eos_token_ids and not self.params.ignore_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output_tokens == self.params.max_tokens else None

    def next_prompt_id(self, stop: int) -> int | None:
        """The prompt's token at position `stop`, if its log probability is requested."""
        is_wanted = self.params.prompt_logprobs is not None and stop < len(self.prompt_ids)
        return self.prompt_ids[stop] if is_wanted else None

    def introduction(self, begins_with: KVPrefix | None = None) -> NewRequest:
        """What stages need to know of the request, for the first plan that computes it."""
        num_prompt_tokens = len(self.prompt_ids)
        return NewRequest(self.request_id, self.params, self.noise_key, num_prompt_tokens, self.log_id, begins_with)

    def take_over(self) -> NewRequest:
        """Introduces a beam, which begins with the KV of its source."""
        assert self.source is not None, "another beam's KV is taken over"
        self.num_computed = self.num_tokens - 1
        prefix = KVPrefix(self.source.request_id, self.num_computed, tuple(self.blocks))
        self.source = None
        return self.introduction(prefix)


class BeamGroup:
    """The requests that are the beams of a search. They share blocks, and are in the same plans.

    Args:
        leader: the request that asks for the search. It computes the prompt, and then is one of the beams.
        eos_token_ids: tokens that end a text.

    Attributes:
        beams: in the order of `search.running`.
    """

    def __init__(self, leader: Request, eos_token_ids: Collection[int]) -> None:
        self.leader = leader
        self._ending_ids = frozenset(
            (*leader.params.stop_token_ids, *(() if leader.params.ignore_eos else eos_token_ids))
        )
        self.restart()

    def restart(self) -> None:
        """Begins the search anew."""
        params = self.leader.params
        self.search = BeamSearch(
            params.num_beams, params.max_tokens, params.length_penalty, params.early_stopping, self._ending_ids
        )
        self.beams = [self.leader]
        self._received: dict[int, Sequence[Continuation]] = {}
        self.leader.token_ids = list(self.leader.prompt_ids)
        self.leader.block_keys = []

    @property
    def num_reserved(self) -> int:
        """Beams that the search will have beside those that run."""
        return self.search.width - len(self.beams)

    def take(self, beam: Request, continuations: Sequence[Continuation]) -> list[Request] | None:
        """Takes a beam's continuations. With those of the last beam, the search makes a step.

        Returns:
            The requests that become beams with another one's KV, their `source`; the others go on. None if there was no
            step, or if it was the last.
        """
        beam.is_awaiting_token = False
        self._received[beam.request_id] = continuations
        if len(self._received) < len(self.beams):
            return None
        self.search = self.search.step([self._received[beam.request_id] for beam in self.beams])
        self._received.clear()
        return self._reorder() if self.search.running else None

    def _reorder(self) -> list[Request]:
        """Each beam's first continuation stays in its request. The others are in requests that no beam needs."""
        before, leader = self.beams, self.leader
        new_ids = range(leader.request_id + len(before), leader.request_id + self.search.width)
        parents = [before[beam.parent] for beam in self.search.running]
        free = [request for request in before if request not in parents]
        free += [self._new_request(request_id) for request_id in new_ids]
        self.beams, moved = [], list[Request]()
        for beam, parent in zip(self.search.running, parents, strict=True):
            request = parent
            if parent in self.beams:
                request = free.pop()
                request.source = parent
                moved.append(request)
            request.token_ids = [*leader.prompt_ids, *beam.token_ids]
            self.beams.append(request)
        return moved

    def _new_request(self, request_id: int) -> Request:
        leader = self.leader
        new = Request(
            request_id, leader.prompt, leader.params, leader.noise_key, leader.log_id, leader.is_moved, leader.key
        )
        new.place, new.group = leader.place, self
        return new


def run_order(request: Request) -> tuple[int, bool, int, int]:
    """The order in which requests run: by priority, then those that were moved, then by place, then by arrival.

    They are preempted in the opposite order.
    """
    return request.params.priority, not request.is_moved, request.place, request.request_id
