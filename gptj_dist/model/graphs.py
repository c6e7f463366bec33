"""Steps with one row for each request, recorded as CUDA graphs for some sizes of micro-batch, and replayed.

Replaying a graph costs the host one launch instead of hundreds for the kernels of the layers. Padding rows fill a
micro-batch up to the next recorded size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptj_dist.model.block_cache import SCRATCH_REQUEST, BlockCache
from gptj_dist.model.gptj import StageModel
from gptj_dist.model.inputs import MicroBatch, Span, to_device
from gptj_dist.model.paged_attention import Grain, PagedAttention, RowIndex

SMALL_SIZES = (1, 2, 4, 8)
SIZE_STEP = 16
"""Difference between larger sizes. Padding rows cost little: the weights are read once for all rows."""
WARM_UP_RUNS = 2

Compute = Callable[[], Tensor]
Record = Callable[[Compute], Compute]
"""Records a computation; returns a function that repeats it on the same memory, results included."""


def batch_sizes(max_batch_size: int) -> list[int]:
    """The sizes to record, ascending; the last is at least `max_batch_size`."""
    sizes = [*SMALL_SIZES, *range(SIZE_STEP, max_batch_size + SIZE_STEP, SIZE_STEP)]
    return sizes[: bisect_left(sizes, max_batch_size) + 1]


class RecordedSteps:
    """A stage's whole step, for micro-batches in which each request has one row.

    Args:
        cache: the cache that the steps read and write.
        sizes: rows of the micro-batches, ascending.
    """

    def __init__(self, model: StageModel, cache: BlockCache, sizes: Sequence[int], record: Record) -> None:
        self._model = model
        self._cache = cache
        self._sizes = sizes
        self._record = record
        # The largest first, so that the others reuse its memory.
        self._steps = {size: _Step(model, cache, size, record) for size in reversed(sizes)}

    def has(self, batch: MicroBatch) -> bool:
        """Whether a recorded step can compute the micro-batch: each request has one row, and there are not too many."""
        return len(batch.spans) == len(batch.positions) <= self._sizes[-1]

    def forget(self) -> None:
        """Forgets the recordings, because the stage has other layers. Each is made again when it is needed first."""
        self._steps.clear()

    def __call__(self, batch: MicroBatch, inputs: Tensor) -> Tensor:
        """As `StageModel.compute`."""
        size = self._sizes[bisect_left(self._sizes, len(inputs))]
        if size not in self._steps:
            self._steps[size] = _Step(self._model, self._cache, size, self._record)
        return self._steps[size](_fill_up(batch, size), inputs)


class _Step:
    """The recorded step of one size, and the memory of its inputs."""

    def __init__(self, model: StageModel, cache: BlockCache, size: int, record: Record) -> None:
        grain = Grain.of(cache)
        self._cache = cache
        self._inputs = inputs = model.blank_inputs(size)
        padding = _fill_up(MicroBatch((), torch.empty(0, dtype=torch.int64)), size)
        self._index = index = RowIndex.draw(padding, cache, grain.tile_rows).to(cache.device)
        self._replay = record(lambda: model.compute(inputs, PagedAttention(cache, index, model.rotary, grain)))

    def __call__(self, batch: MicroBatch, inputs: Tensor) -> Tensor:
        self._index.overwrite(RowIndex.draw(batch, self._cache, tile_rows=1))
        self._inputs[: len(inputs)].copy_(to_device(inputs, self._cache.device))
        return self._replay()[: len(inputs)].clone()


class GraphRecorder:
    """Records CUDA graphs that share their memory, so only one may run at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Implements `Record`. Some runs before the recording compile kernels and choose algorithms."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def _fill_up(batch: MicroBatch, size: int) -> MicroBatch:
    """The micro-batch with padding rows at its end. Each is the first token of `SCRATCH_REQUEST`."""
    num_rows = len(batch.positions)
    filling = tuple(Span(SCRATCH_REQUEST, row, 0, 1) for row in range(num_rows, size))
    return MicroBatch(batch.spans + filling, torch.cat([batch.positions, batch.positions.new_zeros(size - num_rows)]))
