"""The requests that run, and their blocks. Decides nothing."""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.plan import KVPrefix, Plan
from gptj_dist.engine.request import Prompt, Request, run_order


class Running:
    """Running requests and the blocks that they hold.

    Args:
        pool: of the KV blocks.
        can_share_blocks: whether several requests can hold the same block.

    Attributes:
        requests: sorted by `run_order`.
        released: ids of requests that the stages hold and must drop.
    """

    def __init__(self, pool: BlockPool, can_share_blocks: bool) -> None:
        self.requests: list[Request] = []
        self.released: list[int] = []
        self._pool = pool
        self._can_share_blocks = can_share_blocks

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def num_places(self) -> int:
        """Running requests, with the beams that their searches will have."""
        groups = {request.group for request in self.requests if request.group is not None}
        return len(self.requests) + sum(group.num_reserved for group in groups)

    def can_start(self, request: Request, prefix: KVPrefix | None) -> bool:
        """Whether there are blocks for all its present tokens, and all of them are known."""
        blocks = () if prefix is None else prefix.blocks
        num_blocks = self._pool.blocks_for(request.num_tokens) - len(blocks)
        num_free = self._pool.num_free - sum(not self._pool.num_holders(block) for block in blocks)
        return num_blocks <= num_free and not request.is_awaiting_token

    def start(self, request: Request, prefix: KVPrefix | None) -> None:
        """Adds a request. It begins with the KV that is there."""
        insort(self.requests, request, key=run_order)
        if prefix is not None:
            request.blocks = list(prefix.blocks)
            self._pool.share(request.blocks)
            request.num_computed = prefix.num_tokens
            if prefix.source_id is None and not request.has_run:
                request.num_cached_tokens = min(prefix.num_tokens, len(request.prompt_ids))
        request.is_running = request.has_run = True
        if request.prompt.num_shareable:
            request.prompt.holders.append(request)

    def stop(self, request: Request) -> None:
        """Removes a request, of a beam search all beams, and frees the blocks."""
        for one in request.beams:
            self.requests.remove(one)
            one.is_running = False
            if one.prompt.num_shareable:
                one.prompt.holders.remove(one)
            if one.source is None:
                self.released.append(one.request_id)
            self._empty(one)
            one.source = None

    def move(self, beam: Request) -> None:
        """Lets a beam, which may be new, begin with the whole blocks of its source. The stages copy the rest."""
        assert beam.source is not None, "another beam's KV is taken over"
        if beam.is_running:
            self.released.append(beam.request_id)
        else:
            self.start(beam, None)
        self._empty(beam)
        if self._can_share_blocks:
            num_blocks = beam.source.num_computed // self._pool.block_size
            beam.blocks, beam.block_keys = beam.source.blocks[:num_blocks], beam.source.block_keys[:num_blocks]
            self._pool.share(beam.blocks)
            beam.num_computed = num_blocks * self._pool.block_size

    def num_kept_tokens(self, in_flight: Iterable[Plan]) -> int:
        """Tokens of running requests whose keys and values the stages hold. Those that requests share count once.

        Args:
            in_flight: plans that may not have been computed.
        """
        known = [request for request in self.requests if request.source is None]
        num_in_flight: Counter[int] = Counter()
        for chunk in (chunk for plan in in_flight for chunk in plan.chunks):
            num_in_flight[chunk.request_id] += chunk.num_known
        num_kept = sum(max(0, request.num_computed - num_in_flight[request.request_id]) for request in known)
        return num_kept - self._num_shared(known)

    def _num_shared(self, known: Sequence[Request]) -> int:
        """Tokens that are counted more than once if those of each request are."""
        num_holders = Counter(request.prompt for request in known)
        num_shared = sum(
            (number - 1) * prompt.num_shareable for prompt, number in num_holders.items() if prompt.holders
        )
        prompts_of_block: dict[int, set[Prompt]] = defaultdict(set)
        for request in known:
            for block in request.blocks:
                prompts_of_block[block].add(request.prompt)
        return num_shared + self._pool.block_size * sum(len(prompts) - 1 for prompts in prompts_of_block.values())

    def _empty(self, request: Request) -> None:
        self._pool.give_back(request.blocks)
        request.blocks, request.num_computed = [], 0
