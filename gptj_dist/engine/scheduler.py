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

from gptj_dist.chunking import num_decode_groups
from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.chunk_sizes import UNKNOWN_COST, ChunkSizes
from gptj_dist.engine.drafts import Drafter
from gptj_dist.engine.forecast import Pace, room_after_s
from gptj_dist.engine.integrity import check_blocks, check_requests, invariant
from gptj_dist.engine.limits import check_fits_cache
from gptj_dist.engine.plan import Chunk, KVPrefix, Plan, Result
from gptj_dist.engine.preemption import choose_victims
from gptj_dist.engine.prefix import ComingBlocks, can_begin_with_prefix, find_prefix, keep_blocks, known_keys
from gptj_dist.engine.request import (
    BeamGroup,
    FinishReason,
    Request,
    finish_reason,
    num_kept_tokens,
    num_places,
    run_order,
)
from gptj_dist.engine.running import begin_anew, start, stop
from gptj_dist.engine.scheduling import InFlight, NextPlan, SchedulerConfig, TokenOutput
from gptj_dist.engine.waiting import WaitingQueue
from gptj_dist.params import BROKEN_TOKEN, Continuation, TokenLogprobs
from gptj_dist.sizes import ceil_div


class Scheduler:
    """Decides what a pipeline computes. Not thread-safe: one owner calls it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._pool = BlockPool(config.num_blocks, config.block_size)
        self._waiting = WaitingQueue()
        self._running: list[Request] = []
        self._by_id: dict[int, Request] = {}
        self._released: list[int] = []
        self._in_flight: deque[InFlight] = deque()
        self._plan_ids = count()
        self._chunk_sizes = ChunkSizes(config.num_stages, config.max_chunk_tokens)
        self._keeps_prefixes = config.keeps_prefixes and config.can_share_blocks
        self.num_preemptions = 0

    @property
    def waiting(self) -> WaitingQueue:
        """The requests that do not run; for its counts."""
        return self._waiting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def num_of_adapters(self) -> dict[str, int]:
        """The number of running and waiting requests that have each adapter."""
        requests = (*self._running, *self._waiting)
        return dict(Counter(choice.name for request in requests for choice in request.params.adapters))

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_used_blocks(self) -> int:
        return self._config.num_blocks - self._pool.num_free

    @property
    def num_kept_tokens(self) -> int:
        """See `request.num_kept_tokens`."""
        return num_kept_tokens(self._running, [flight.plan for flight in self._in_flight], self._config.block_size)

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks that hold what later requests may begin with."""
        return self._pool.num_kept

    @property
    def num_evicted_blocks(self) -> int:
        """Blocks that were needed while they held what later requests might have begun with."""
        return self._pool.num_evicted

    @property
    def row_s(self) -> float:
        """Measured seconds of a token's row on the slowest stage; 0 before the first step."""
        cost = self._chunk_sizes.cost
        return cost.row_s if cost is not None else 0.0

    @property
    def is_full(self) -> bool:
        """Whether no other request can run before one ends."""
        is_short = bool(self._waiting) and not self._can_run(self._waiting[0], None)
        return is_short or num_places(self._running) >= self._config.max_batch_size

    def known_keys(self, max_keys: int) -> list[bytes]:
        """See `prefix.known_keys`; of the requests that wait, only those that are next."""
        if not self._keeps_prefixes:
            return []
        next_ones = islice(self._waiting, self._config.max_batch_size)
        return known_keys(self._pool, (*self._running, *next_ones), max_keys)

    @property
    def has_requests(self) -> bool:
        return bool(self._by_id)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestTooLongError: it could never fit the KV cache.
        """
        kv_tokens = self._config.num_blocks * self._config.block_size
        check_fits_cache(
            request.prompt_ids, request.params, kv_tokens, self._config.block_size, self._config.can_share_blocks
        )
        if request.params.use_beam_search:
            request.group = BeamGroup(request, self._config.eos_token_ids)
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
        self._add_decodes(next_plan)
        self._add_prefills(next_plan)
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
            self._chunk_sizes.observe(landed.plan.num_tokens, max(t.end_ns - t.begin_ns for t in result.timings) * 1e-9)
        for of_prompt in result.prompt_logprobs:  # even if the request has ended: others of its prompt need them
            landed.requests[of_prompt.request_id].prompt.add_logprobs(of_prompt)
        outputs = [
            *(
                output
                for chunk, tokens in result.sampled(landed.plan)
                if chunk.request_id in self._by_id
                for output in self._take_tokens(chunk, tokens)
            ),
            *(
                self._take_beam(self._by_id[id_], several)
                for id_, several in result.continuations
                if id_ in self._by_id
            ),
            *(self._take_embedding(self._by_id[id_], data) for id_, data in result.embeddings if id_ in self._by_id),
        ]
        return [output for output in outputs if output is not None]

    def drain(self) -> list[Request]:
        """Drops all requests and plans, because the pipeline has died; returns the requests in their order.

        Each request keeps its tokens. Added to another scheduler, it is recomputed and continues where it was.
        """
        all_requests = (*self._running, *self._waiting)
        requests = sorted((request for request in all_requests if request.leader is request), key=run_order)
        for request in requests:
            self._remove(request)
            request.is_awaiting_token = False
        self._pool.forget(range(self._config.num_blocks))
        self._in_flight.clear()
        self._released.clear()
        self._chunk_sizes.forget_backlog()
        return requests

    def room_after_s(self, token_s: float, early_share: float) -> float:
        """Estimate of the seconds of computing until the next new request can run.

        Args:
            token_s, early_share: see `Pace`.
        """
        row_s = self.row_s
        in_flight_s = row_s * sum(flight.plan.num_tokens for flight in self._in_flight)
        pace = Pace(token_s, row_s, early_share)
        size = self._config.max_batch_size
        return in_flight_s + room_after_s(self._running, self._waiting, self._pool, size, pace)

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant is broken. Takes time in proportion to the number of blocks."""
        ids = [request.request_id for request in (*self._running, *self._waiting)]
        invariant(set(ids) == set(self._by_id) and len(ids) == len(self._by_id), "a request is lost")
        invariant(len(self._running) <= self._config.max_batch_size, "too many requests run")
        invariant(len(self._in_flight) <= self._config.max_in_flight, "too many plans in flight")
        check_blocks(self._running, self._pool, self._config.max_drafts)
        chunks = [chunk for flight in self._in_flight for chunk in flight.plan.chunks]
        awaited_ids = [chunk.request_id for chunk in chunks if chunk.samples or chunk.ends_embedding]
        check_requests(self._running, self._waiting, [id_ for id_ in awaited_ids if id_ in self._by_id])

    def _add_decodes(self, next_plan: NextPlan) -> None:
        """Adds a share of the requests with one token to compute. All micro-batches get equal shares."""
        decoding = [request for request in self._running if request.is_decoding]
        ready = [request for request in decoding if not request.is_awaiting_token]
        num_groups = num_decode_groups(len(decoding), self._config.num_stages, self._config.shares_memory)
        groups = [flight.num_decodes for flight in self._in_flight if flight.num_decodes]
        num_groups_free = num_groups - len(groups)
        if not ready or num_groups_free <= 0:
            return
        size, num_larger = divmod(len(decoding), num_groups)
        is_larger = sum(group > size for group in groups) < num_larger
        share = max(1, min(ceil_div(len(ready), num_groups_free), size + is_larger))
        share = min(share, len(ready))
        for request in ready[:share]:
            if not request.is_running or request in next_plan.starts:
                continue  # one before it has preempted it, or was another beam of its search
            if request.group is None:
                self._add_chunk(next_plan, request, 1, self._drafts(request, num_decodes=share))
            else:
                self._add_beams(next_plan, request)
        next_plan.num_decodes = len(next_plan.chunks)

    def _drafts(self, request: Request, num_decodes: int) -> Sequence[int]:
        """Guesses of the request's next tokens, for a micro-batch of `num_decodes` requests.

        None before the first token, with which results come that belong to no other.
        """
        num_output_tokens = request.num_output_tokens
        num_free = self._pool.num_free - len(self._running)  # drafts preempt no request
        room = (len(request.blocks) + num_free) * self._config.block_size - request.num_tokens
        most = min(self._config.max_drafts, request.params.max_tokens - num_output_tokens - 1, room)
        if most <= 0 or not num_output_tokens:
            return ()
        if request.drafter is None:
            request.drafter = Drafter(request.prompt_ids, request.prediction_ids)
        cost = self._chunk_sizes.cost or UNKNOWN_COST
        rows_s = num_decodes * cost.row_s
        return request.drafter.draft(request.token_ids, most, rows_s / (cost.overhead_s + rows_s))

    def _add_prefills(self, next_plan: NextPlan) -> None:
        """Fills the micro-batch with prompt tokens, first of running requests, then of waiting ones."""
        prompts = [request for request in self._running if not request.is_decoding]
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
            if num_places(self._running) + request.params.num_beams > self._config.max_batch_size:
                return
            source = self._source(next_plan, request)
            if source is None and request.prompt.holders:
                index += 1  # another request computes the prompt; later ones may overtake this one
                continue
            prefix = self._prefix(request, source)
            is_soon = source is None and coming.num_tokens(request, prefix) > min_tokens
            if is_soon and index < self._config.max_batch_size:
                index += 1  # others compute more of its first tokens
            elif self._can_run(request, prefix):
                self._admit(next_plan, request, prefix)
                if self._keeps_prefixes:
                    coming.add(request)
                room -= self._add_chunk(next_plan, request, min(room, request.num_uncomputed))
            else:
                return

    def _source(self, next_plan: NextPlan, request: Request) -> Request | None:
        """A request whose KV of the same prompt earlier plans have computed, so that it can be taken over."""
        num_needed = request.prompt.num_shareable
        return next((r for r in request.prompt.holders if next_plan.starts.get(r, r.num_computed) >= num_needed), None)

    def _prefix(self, request: Request, source: Request | None) -> KVPrefix | None:
        """The KV that the request can begin with."""
        if source is not None:
            num_tokens, num_blocks = request.prompt.num_shareable, 0
            if self._config.can_share_blocks:
                num_blocks = num_tokens // self._config.block_size
            return KVPrefix(source.request_id, num_tokens, tuple(source.blocks[:num_blocks]))
        if not self._keeps_prefixes or not can_begin_with_prefix(request.params):
            return None
        return find_prefix(self._pool, request)

    def _can_run(self, request: Request, prefix: KVPrefix | None) -> bool:
        """Whether the cache has room for all its present tokens, and all of them are known."""
        blocks = () if prefix is None else prefix.blocks
        num_blocks = self._pool.blocks_for(request.num_tokens) - len(blocks)
        num_free = self._pool.num_free - sum(not self._pool.num_holders(block) for block in blocks)
        return num_blocks <= num_free and not request.is_awaiting_token

    def _admit(self, next_plan: NextPlan, request: Request, prefix: KVPrefix | None) -> None:
        """Moves the request from the queue to the running ones. It begins with the KV that is there."""
        self._waiting.remove(request)
        start(self._running, self._pool, request, prefix)
        self._waiting.last_place = max(self._waiting.last_place, request.place)
        next_plan.new_requests.append(request.introduction(prefix))

    def _add_beams(self, next_plan: NextPlan, search: Request) -> None:
        """Adds the next token of every beam of a search, or of none."""
        num_blocks = sum(self._pool.blocks_for(beam.num_tokens) - len(beam.blocks) for beam in search.beams)
        if not self._make_room(num_blocks, search, next_plan):
            return
        for beam in search.beams:
            if beam.source is not None:
                beam.num_computed = beam.num_tokens - 1
                prefix = KVPrefix(beam.source.request_id, beam.num_computed, tuple(beam.blocks))
                next_plan.new_requests.append(beam.introduction(prefix))
                beam.source = None
            self._add_chunk(next_plan, beam, 1)

    def _add_chunk(self, next_plan: NextPlan, request: Request, num_tokens: int, drafts: Sequence[int] = ()) -> int:
        """Adds the request's next tokens, and drafts after its last one; returns their number without drafts.

        0 if there are no blocks for them.
        """
        start, stop = request.num_computed, request.num_computed + num_tokens
        num_new_blocks = max(0, self._pool.blocks_for(stop + len(drafts)) - len(request.blocks))
        if not self._make_room(num_new_blocks, request, next_plan):
            return 0
        new_blocks = self._pool.take(num_new_blocks)
        request.blocks.extend(new_blocks)
        request.num_computed = stop
        request.is_awaiting_token = stop == request.num_tokens
        pools = request.params.pooling is not None
        next_plan.chunks.append(
            Chunk(
                request_id=request.request_id,
                start=start,
                token_ids=(*request.token_ids[start:stop], *drafts),
                new_blocks=tuple(new_blocks),
                samples=request.is_awaiting_token and not pools,
                next_id=request.next_prompt_id(stop),
                ends_embedding=request.is_awaiting_token and pools,
                num_drafts=len(drafts),
            )
        )
        next_plan.starts[request] = start
        return num_tokens

    def _make_room(self, num_blocks: int, request: Request, next_plan: NextPlan) -> bool:
        """Preempts requests that come after this one, the last first, until the blocks are free. Else preempts none."""
        if num_blocks <= self._pool.num_free:
            return True
        victims = choose_victims(num_blocks, request, self._running, next_plan.starts, self._pool)
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
            tuple(self._released),
            tuple(next_plan.new_requests),
            tuple(next_plan.chunks),
            is_lone=not self._in_flight and all(request.is_awaiting_token for request in self._running),
        )
        self._released.clear()
        if self._keeps_prefixes:
            for request, start in next_plan.starts.items():
                keep_blocks(self._pool, request, start)
        requests = {request.request_id: request for request in next_plan.starts}
        self._in_flight.append(InFlight(plan, next_plan.num_decodes, requests))
        return plan

    def _take_beam(self, beam: Request, continuations: Sequence[Continuation]) -> TokenOutput | None:
        """Takes a beam's continuations. Returns the texts that the search has found if they were its last."""
        assert beam.group is not None, "only beams have continuations"
        for moved in beam.group.take(beam, continuations) or ():
            if moved.is_running:
                self._released.append(moved.request_id)
            else:
                self._by_id[moved.request_id] = moved
                start(self._running, self._pool, moved, None)
            begin_anew(self._pool, moved, self._config.can_share_blocks)
        if beam.group.search.running:
            return None
        ended = beam.group.search.ended
        self._remove(beam.leader)
        return TokenOutput(beam.leader, None, finish_reason(ended[0] if ended else None), beams=ended)

    def _take_tokens(self, chunk: Chunk, sampled: Sequence[tuple[int, TokenLogprobs | None]]) -> list[TokenOutput]:
        """Takes accepted drafts and the token after them, up to one that ends the request."""
        request = self._by_id[chunk.request_id]
        if chunk.num_drafts and request.drafter is not None:
            request.drafter.note(chunk.num_drafts, len(sampled) - 1)
        outputs: list[TokenOutput] = []
        for token_id, logprobs in sampled:
            if outputs and request.is_running:  # the token before was a draft, so its KV is computed
                request.num_computed += 1
                if self._keeps_prefixes:
                    keep_blocks(self._pool, request, request.num_computed - 1)
            output = self._take_token(request, token_id, logprobs)
            outputs += [] if output is None else [output]
            if output is None or output.finish_reason is not None:
                break
        return outputs

    def _take_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> TokenOutput | None:
        if request.group is not None and token_id != BROKEN_TOKEN:
            return None  # its continuations count
        num_tokens = request.num_tokens
        reason = request.append(token_id, self._config.eos_token_ids)
        if not request.is_running:  # preempted while the token was in flight
            self._waiting.num_tokens += request.num_tokens - num_tokens
        if reason == FinishReason.ERROR:
            for beam in request.beams:
                self._pool.forget(self._pool.find(beam.block_keys))  # it may have given the blocks back
        if reason is not None:
            self._remove(request.leader)
        is_kept = request.params.max_tokens > 0 and token_id >= 0
        return TokenOutput(request.leader, *((token_id, reason, logprobs) if is_kept else (None, reason)))

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
        for beam in request.beams:
            if beam is not request:
                del self._by_id[beam.request_id]
        self._released += stop(self._running, self._pool, request)
