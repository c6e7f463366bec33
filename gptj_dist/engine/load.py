"""How loaded a pipeline is, for whatever decides how many pipelines there are."""

from __future__ import annotations

from dataclasses import dataclass

from gptj_dist.engine.scheduler import Scheduler

FULL_WAIT_S = 2.0
"""A pipeline at which a request waits so long is full, whatever places and blocks it has."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a pipeline's requests take of it, running and waiting ones.

    Args:
        places: share of the places in its batch.
        kv: share of its KV blocks.
        wait_s: seconds until a request that arrives now can run.
    """

    places: float
    kv: float
    wait_s: float

    @classmethod
    def of(cls, scheduler: Scheduler, max_batch_size: int, wait_s: float) -> Load:
        """The load of the pipeline with this scheduler."""
        pool = scheduler.pool
        num_blocks = scheduler.num_used_blocks + pool.blocks_for(scheduler.waiting.num_tokens)
        num_requests = scheduler.num_running + scheduler.num_waiting
        return cls(num_requests / max_batch_size, num_blocks / pool.num_blocks, wait_s)

    @property
    def share(self) -> float:
        """The largest share that they take of anything. Above 1 some of them wait for others."""
        return max(self.places, self.kv, self.wait_s / FULL_WAIT_S)
