"""Decides what goes into each micro-batch. Knows no tensors, no clock and no transport.

There is no prefill phase and no decode phase: every request has a number of computed tokens that catches up with its
number of tokens. Chunked prefill and recomputation after a preemption both fall out of that rule.

Requests run by priority, and then by arrival, but keys take turns (`engine/fairness.py`); those of a lost pipeline come
before all that arrived here. When KV blocks run out, the last running request gives up its blocks and returns to the
queue. The first one always continues, so every request finishes unless requests of a better priority keep arriving.

One of the requests of a prompt computes it. The others wait for it and then begin with its KV: they share whole blocks,
and the stages copy the rest. If no running request holds the prompt any more, the next one computes it again.

Whole blocks keep what they hold after their requests have ended, until they are needed for something else. A request
whose first tokens they hold begins with them, and waits for those that running requests compute.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import count, islice

from gptj_dist.chunking import StepCost, decode_share
from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.chunk_sizes import UNKNOWN_COST, ChunkSizes
from gptj_dist.engine.drafting import Drafting
from gptj_dist.engine.forecast import Pace, room_after_s
from gptj_dist.engine.integrity import check_blocks, check_requests, invariant
from gptj_dist.engine.limits import check_fits_cache
from gptj_dist.engine.plan import Chunk, KVPrefix, Plan, Result
from gptj_dist.engine.preemption import choose_victims
from gptj_dist.engine.prefix import ComingBlocks, find_prefix, find_source, keep_blocks, known_keys, prefix_of
from gptj_dist.engine.request import BeamGroup, FinishReason, Request, finish_reason, run_order
from gptj_dist.engine.running import Running
from gptj_dist.engine.scheduling import InFlight, NextPlan, SchedulerConfig, TokenOutput
from gptj_dist.engine.waiting import WaitingQueue
from gptj_dist.params import BROKEN_TOKEN, Continuation, TokenLogprobs


class Scheduler:
    """Decides what a pipeline computes. Not thread-safe: one owner calls it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._pool = BlockPool(config.num_blocks, config.block_size)
        self._waiting = WaitingQueue()
        self._running = Running(self._pool, config.can_share_blocks)
        self._by_id: dict[int, Request] = {}
        self._in_flight: deque[InFlight] = deque()
        self._plan_ids = count()
        self._chunk_sizes = ChunkSizes(config.num_stages, config.max_chunk_tokens)
        self._keeps_prefixes = config.keeps_prefixes and config.can_share_blocks
        self._drafting = Drafting(config.max_drafts, self._pool)
        self.num_preemptions = 0

    @property
    def waiting(self) -> WaitingQueue:
        """The requests that do not run; for its counts."""
        return self._waiting

    @property
    def pool(self) -> BlockPool:
        """The KV blocks; for its counts."""
        return self._pool

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def num_of_adapters(self) -> dict[str, int]:
        """The number of running and waiting requests that have each adapter."""
        requests = (*self._running.requests, *self._waiting)
        return dict(Counter(choice.name for request in requests for choice in request.params.adapters))

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_used_blocks(self) -> int:
        return self._pool.num_blocks - self._pool.num_free

    @property
    def num_kept_tokens(self) -> int:
        """See `Running.num_kept_tokens`."""
        return self._running.num_kept_tokens(flight.plan for flight in self._in_flight)

    @property
    def step_cost(self) -> StepCost:
        """Measured cost of a step of the slowest stage; nothing before the first step."""
        return self._chunk_sizes.cost or StepCost(0.0, 0.0)

    @property
    def is_full(self) -> bool:
        """Whether no other request can run before one ends."""
        is_short = bool(self._waiting) and not self._running.can_start(self._waiting[0], None)
        return is_short or self._running.num_places >= self._config.max_batch_size

    def known_keys(self, max_keys: int) -> list[bytes]:
        """See `prefix.known_keys`; of the requests that wait, only those that are next."""
        if not self._keeps_prefixes:
            return []
        next_ones = islice(self._waiting, self._config.max_batch_size)
        return known_keys(self._pool, (*self._running.requests, *next_ones), max_keys)

    @property
    def has_requests(self) -> bool:
        return bool(self._by_id)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestTooLongError: it could never fit the KV cache.
        """
        config = self._config
        kv_tokens = config.num_blocks * config.block_size
        check_fits_cache(request.prompt_ids, request.params, kv_tokens, config.block_size, config.can_share_blocks)
        if request.params.use_beam_search:
            request.group = BeamGroup(request, config.eos_token_ids)
        self._by_id[request.request_id] = request
        self._waiting.add(request)

    def abort(self, request_id: int) -> None:
        """Drops a request and frees its blocks at once; plans in flight may still compute it. Ignores unknown ids."""
        request = self._by_id.get(request_id)
        if request is not None:
            self._remove(request)
            self._chunk_sizes.forget_backlog()

    def schedule(self) -> Plan | None:
        """The next micro-batch, or None when there is nothing to do or enough is in flight."""
        if len(self._in_flight) >= self._config.max_in_flight:
            return None
        next_plan = NextPlan()
        prompts = [request for request in self._running.requests if not request.is_decoding]
        self._add_decodes(next_plan, len(self._running) - len(prompts))
        self._add_prefills(next_plan, [request for request in prompts if request.is_running])
        return self._commit(next_plan) if next_plan.chunks else None

    def update(self, result: Result) -> list[TokenOutput]:
        """Takes the result of the oldest plan in flight; returns the new tokens, in the plan's order.

        Raises:
            ValueError: results came out of order.
        """
        expected = self._in_flight[0].plan.plan_id if self._in_flight else None
        if result.plan_id != expected:
            raise ValueError(f"result of plan {result.plan_id} arrived, expected {expected}")
        landed = self._in_flight.popleft()
        if result.timings:
            step_s = max(timing.end_ns - timing.begin_ns for timing in result.timings) * 1e-9
            self._chunk_sizes.observe(landed.plan.num_tokens, step_s)
            self._drafting.observe(landed.plan, step_s)
        for of_prompt in result.prompt_logprobs:  # even if the request has ended: others of its prompt need them
            landed.requests[of_prompt.request_id].prompt.add_logprobs(of_prompt)
        outputs: list[TokenOutput] = []
        for chunk, tokens in result.sampled(landed.plan):
            if chunk.request_id in self._by_id:
                outputs += self._take_tokens(chunk, tokens)
        for id_, continuations in result.continuations:
            if id_ in self._by_id:
                outputs += self._take_beam(self._by_id[id_], continuations)
        for id_, data in result.embeddings:
            if id_ in self._by_id:
                outputs.append(self._take_embedding(self._by_id[id_], data))
        return outputs

    def drain(self) -> list[Request]:
        """Drops all requests and plans, because the pipeline has died; returns the requests in their order.

        Each request keeps its tokens. Added to another scheduler, it is recomputed and continues where it was.
        """
        all_requests = (*self._running.requests, *self._waiting)
        requests = sorted((request for request in all_requests if request.leader is request), key=run_order)
        for request in requests:
            self._remove(request)
            request.is_awaiting_token = False
        self._pool.forget(range(self._config.num_blocks))
        self._in_flight.clear()
        self._running.released.clear()
        self._chunk_sizes.forget_backlog()
        return requests

    def room_after_s(self, token_s: float, early_share: float) -> float:
        """Estimate of the seconds of computing until the next new request can run.

        Args:
            token_s, early_share: see `Pace`.
        """
        in_flight_s = self.step_cost.row_s * sum(flight.plan.num_tokens for flight in self._in_flight)
        pace = Pace(token_s, self.step_cost.row_s, early_share)
        size = self._config.max_batch_size
        return in_flight_s + room_after_s(self._running.requests, self._waiting, self._pool, size, pace)

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant is broken. Takes time in proportion to the number of blocks."""
        running = self._running.requests
        invariant(len(running) <= self._config.max_batch_size, "too many requests run")
        invariant(len(self._in_flight) <= self._config.max_in_flight, "too many plans in flight")
        check_blocks(running, self._pool, self._config.max_drafts)
        chunks = [chunk for flight in self._in_flight for chunk in flight.plan.chunks]
        awaited_ids = [chunk.request_id for chunk in chunks if chunk.samples or chunk.ends_embedding]
        check_requests(running, self._waiting, self._by_id, awaited_ids)

    def _add_decodes(self, next_plan: NextPlan, num_decoding: int) -> None:
        """Adds a share of the requests with one token to compute. All micro-batches get equal shares."""
        config = self._config
        running = self._running.requests
        ready = [request for request in running if not request.is_awaiting_token and request.is_decoding]
        groups = [flight.num_decodes for flight in self._in_flight if flight.num_decodes]
        share = decode_share(num_decoding, len(ready), groups, config.num_stages, config.shares_memory)
        row_share = self._drafting.row_share(share)
        for request in ready[:share]:
            if not request.is_running or request in next_plan.starts:
                continue  # one before it has preempted it, or was another beam of its search
            if request.group is not None:
                self._add_beams(next_plan, request)
                continue
            drafts = self._drafting.drafts(request, len(running), row_share) if config.max_drafts else ()
            self._add_chunk(next_plan, request, 1, drafts)
        next_plan.num_decodes = len(next_plan.chunks)

    def _add_prefills(self, next_plan: NextPlan, prompts: Sequence[Request]) -> None:
        """Fills the micro-batch with prompt tokens, first of running requests, then of waiting ones."""
        num_tokens = self._waiting.num_tokens + sum(request.num_uncomputed for request in prompts)
        room = self._chunk_sizes.room(num_tokens, has_decodes=next_plan.num_decodes > 0)
        coming = ComingBlocks(self._pool, prompts if self._waiting and self._keeps_prefixes else ())
        cost = self._chunk_sizes.cost or UNKNOWN_COST
        min_tokens = cost.overhead_s / cost.row_s  # fewer are computed sooner than the next plan begins
        for request in prompts:
            if room and request.is_running:  # a request before it may have preempted it
                room -= self._add_chunk(next_plan, request, min(room, request.num_uncomputed))
        index = 0
        while room and index < len(self._waiting):
            request = self._waiting[index]
            if self._running.num_places + request.params.num_beams > self._config.max_batch_size:
                return
            source = find_source(request, next_plan.starts)
            if source is None and request.prompt.holders:
                index += 1  # another request computes the prompt; later ones may overtake this one
                continue
            prefix = self._prefix(request, source)
            is_soon = source is None and coming.num_tokens(request, prefix) > min_tokens
            if is_soon and index < self._config.max_batch_size:
                index += 1  # others compute more of its first tokens
            elif self._running.can_start(request, prefix):
                self._admit(next_plan, request, prefix)
                if self._keeps_prefixes:
                    coming.add(request)
                room -= self._add_chunk(next_plan, request, min(room, request.num_uncomputed))
            else:
                return

    def _prefix(self, request: Request, source: Request | None) -> KVPrefix | None:
        """The KV that the request can begin with."""
        if source is not None:
            return prefix_of(source, self._config.block_size if self._config.can_share_blocks else None)
        return find_prefix(self._pool, request) if self._keeps_prefixes else None

    def _admit(self, next_plan: NextPlan, request: Request, prefix: KVPrefix | None) -> None:
        """Moves the request from the queue to the running ones. It begins with the KV that is there."""
        self._waiting.remove(request)
        self._running.start(request, prefix)
        self._waiting.last_place = max(self._waiting.last_place, request.place)
        next_plan.new_requests.append(request.introduction(prefix))

    def _add_beams(self, next_plan: NextPlan, search: Request) -> None:
        """Adds the next token of every beam of a search, or of none."""
        num_blocks = sum(self._pool.blocks_for(beam.num_tokens) - len(beam.blocks) for beam in search.beams)
        if not self._make_room(num_blocks, search, next_plan):
            return
        for beam in search.beams:
            if beam.source is not None:
                next_plan.new_requests.append(beam.take_over())
            self._add_chunk(next_plan, beam, 1)

    def _add_chunk(self, next_plan: NextPlan, request: Request, num_tokens: int, drafts: Sequence[int] = ()) -> int:
        """Adds the request's next tokens, and drafts after its last one; returns their number without drafts.

        0 if there are no blocks for them.
        """
        start = request.num_computed
        stop = start + num_tokens
        num_new_blocks = self._pool.blocks_for(stop + len(drafts)) - len(request.blocks)
        new_blocks: Sequence[int] = ()
        if num_new_blocks > 0:
            if not self._make_room(num_new_blocks, request, next_plan):
                return 0
            new_blocks = self._pool.take(num_new_blocks)
            request.blocks += new_blocks
        request.num_computed = stop
        next_plan.add(request, start, drafts, new_blocks)
        return num_tokens

    def _make_room(self, num_blocks: int, request: Request, next_plan: NextPlan) -> bool:
        """Preempts requests that come after this one, the last first, until the blocks are free. Else preempts none."""
        victims = choose_victims(num_blocks, request, self._running.requests, next_plan.starts, self._pool)
        for victim in victims or ():
            if victim.is_running:  # not preempted with another beam of its search
                self._preempt(victim.leader)
        return victims is not None

    def _preempt(self, request: Request) -> None:
        """Frees the request's blocks and puts it back into the queue. It will be recomputed from its first token; a
        beam search begins anew."""
        self._stop_running(request)
        if request.group is not None:
            request.group.restart()
        self._waiting.add(request)
        self.num_preemptions += 1

    def _commit(self, next_plan: NextPlan) -> Plan:
        plan = Plan(
            next(self._plan_ids),
            tuple(self._running.released),
            tuple(next_plan.new_requests),
            tuple(next_plan.chunks),
            is_lone=not self._in_flight and all(request.is_awaiting_token for request in self._running.requests),
        )
        self._running.released.clear()
        for request, start in next_plan.starts.items():
            self._keep_blocks(request, start)
        requests = {request.request_id: request for request in next_plan.starts}
        self._in_flight.append(InFlight(plan, next_plan.num_decodes, requests))
        return plan

    def _keep_blocks(self, request: Request, start: int) -> None:
        """Keeps for later requests what is computed from `start` on."""
        if self._keeps_prefixes and start // self._config.block_size != request.num_computed // self._config.block_size:
            keep_blocks(self._pool, request, start)
            if self._config.max_drafts:
                self._drafting.learn(request, start)

    def _take_beam(self, beam: Request, continuations: Sequence[Continuation]) -> list[TokenOutput]:
        """Takes a beam's continuations. Returns the texts that the search has found if they were its last."""
        assert beam.group is not None, "only beams have continuations"
        for moved in beam.group.take(beam, continuations) or ():
            self._by_id[moved.request_id] = moved
            self._running.move(moved)
        if beam.group.search.running:
            return []
        ended = beam.group.search.ended
        self._remove(beam.leader)
        return [TokenOutput(beam.leader, None, finish_reason(ended[0] if ended else None), beams=ended)]

    def _take_tokens(self, chunk: Chunk, sampled: Sequence[tuple[int, TokenLogprobs | None]]) -> list[TokenOutput]:
        """Takes accepted drafts and the token after them, up to one that ends the request."""
        request = self._by_id[chunk.request_id]
        if request.group is not None and sampled[0][0] != BROKEN_TOKEN:
            return []  # its continuations count
        if chunk.num_drafts:
            self._drafting.note(request, chunk.num_drafts, len(sampled) - 1)
        outputs: list[TokenOutput] = []
        for place, (token_id, logprobs) in enumerate(sampled, start=1):
            if outputs and request.is_running:  # the token before was a draft, so its KV is computed
                request.num_computed += 1
                self._keep_blocks(request, request.num_computed - 1)
            output = self._take_token(request, token_id, logprobs)
            outputs.append(output._replace(is_draft=True) if place < len(sampled) else output)
            if outputs[-1].finish_reason is not None:
                break
        return outputs

    def _take_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        num_tokens = request.num_tokens
        reason = request.append(token_id, self._config.eos_token_ids)
        if not request.is_running:  # preempted while the token was in flight
            self._waiting.num_tokens += request.num_tokens - num_tokens
        if reason == FinishReason.ERROR:
            for beam in request.beams:
                self._pool.forget(self._pool.find(beam.block_keys))  # it may have given the blocks back
        if reason is not None:
            self._remove(request.leader)
        if request.params.max_tokens == 0 or token_id < 0:
            return TokenOutput(request.leader, None, reason)
        return TokenOutput(request.leader, token_id, reason, logprobs)

    def _take_embedding(self, request: Request, data: bytes) -> TokenOutput:
        request.is_awaiting_token = False
        self._remove(request)
        return TokenOutput(request, None, FinishReason.LENGTH, embedding=data)

    def _remove(self, request: Request) -> None:
        del self._by_id[request.request_id]
        if request.is_running:
            self._stop_running(request)
        else:
            self._waiting.remove(request)

    def _stop_running(self, request: Request) -> None:
        """Frees its blocks. The next plan lists it as released, so that the stages drop it."""
        for beam in {*request.beams} - {request}:
            del self._by_id[beam.request_id]
        self._running.stop(request)
