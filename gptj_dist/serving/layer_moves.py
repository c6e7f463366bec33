"""A pipeline's moves of layers: those that a person asks for, and with `--rebalance` those that it makes by itself."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from gptj_dist.engine.histogram import Histogram
from gptj_dist.engine.stats import PipelineStats, PlanRecord
from gptj_dist.errors import ConfigurationError, GPTJDistError
from gptj_dist.logs import values
from gptj_dist.planning.moves import layer_moves
from gptj_dist.planning.partition import explicit_partition, layer_ranges, lm_head_cost_layers
from gptj_dist.planning.rebalance import Balance, BetterCut, better_cut
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.blueprint import LoadedPipeline
from gptj_dist.stages.group import StageGroup
from gptj_dist.stages.relocation import MovedLayer

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Time between two looks at the balance of the stages."""

MIN_PLANS = 16
"""Plans that a look needs: the mean of fewer steps says little."""

MIN_BUSY_SHARE = 0.5
"""Below it the slowest stage holds nobody up, so layers stay."""

MoveReason = Literal["asked", "balance"]
MOVE_REASONS: tuple[MoveReason, ...] = get_args(MoveReason)


@dataclass(slots=True)
class MoveTotals:
    """Since the coordinator started.

    Attributes:
        num_moved: layers, by the reason.
        pause: see `MovedLayer.pause_s`.
    """

    num_moved: Counter[str] = field(default_factory=Counter)
    pause: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True, slots=True)
class Recut:
    """What a pipeline did for a new cut.

    Args:
        layers: of each stage, afterwards.
        moved: in their order.
        problem: why the cut is not the one that was asked for; None if it is.
        is_refused: nothing was tried, because the cut does not suit the pipeline.
    """

    name: str
    layers: tuple[int, ...]
    moved: tuple[MovedLayer, ...] = ()
    problem: str | None = None
    is_refused: bool = False

    def as_json(self) -> dict[str, object]:
        """Its part of the response of `POST /debug/repartition`."""
        moved = [_facts(each) for each in self.moved]
        return {"name": self.name, "layers": self.layers, "moved": moved, "problem": self.problem}


class LayerMoves:
    """Moves layers, one after another, while the pipeline computes.

    Args:
        name: of the pipeline.
    """

    def __init__(self, name: str, group: StageGroup, stats: PipelineStats) -> None:
        self._name = name
        self._group = group
        self._stats = stats
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Recut]] = set()
        self.totals = MoveTotals()

    async def recut(self, layers: Sequence[int], reason: MoveReason = "asked") -> Recut:
        """Moves layers until each stage has as many as asked for, even if the caller leaves. One call after another."""
        task = asyncio.create_task(self._recut(layers, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _recut(self, layers: Sequence[int], reason: MoveReason) -> Recut:
        async with self._lock:
            moved: list[MovedLayer] = []
            try:
                async for each in self._moves(layers, reason):
                    moved.append(each)
            except GPTJDistError as error:
                logger.error("layers do not move", extra=values(layers=str(layers), error=str(error)))
                is_refused = isinstance(error, ConfigurationError) and not moved
                return Recut(self._name, _counts(self._group.loaded), tuple(moved), str(error), is_refused)
            return Recut(self._name, _counts(self._group.loaded), tuple(moved))

    def keep_balance_in_background(self) -> asyncio.Task[None]:
        """Runs `keep_balance` until the task is cancelled."""
        return run_in_background("balance of the stages", self.keep_balance(), _note_end)

    async def keep_balance(self) -> None:
        """Moves layers away from a stage that stays the slowest. Runs until it is cancelled."""
        balance, since, first, layers = Balance(), 0, 0, _counts(self._group.loaded)
        while True:
            await asyncio.sleep(LOOK_S)
            if (now := _counts(self._group.loaded)) != layers:  # somebody has asked for it
                layers, since = now, self._stats.num_plans
                balance.begin_anew()
            records = self._stats.records(since)
            if len(records) < MIN_PLANS:
                continue
            since = records[-1].number + 1
            found = self.look(records, balance.least_ratio)
            is_sure = balance.note(None if found is None else found.slowest)
            if balance.num_looks == 1:
                first = records[0].number
            if is_sure and (cut := self.look(self._stats.records(first), balance.least_ratio)) is not None:
                logger.info("stages are out of balance", extra=values(reason=str(cut), gain=round(cut.gain, 3)))
                balance.note_new_cut()
                layers = (await self.recut(cut.layers, "balance")).layers
                since = self._stats.num_plans

    def look(self, records: Sequence[PlanRecord], least_ratio: float) -> BetterCut | None:
        """A cut that would have been better for these plans.

        Args:
            least_ratio: see `better_cut`.
        """
        busy = [stage.busy_share or 0.0 for stage in self._stats.snapshot().stages]
        timings = [record.timings for record in records if record.timings]
        if not timings or max(busy, default=0.0) < MIN_BUSY_SHARE:
            return None
        loaded = self._group.loaded
        step_s = [
            sum(each.end_ns - each.begin_ns for each in of_stage) * 1e-9 / len(timings)
            for of_stage in zip(*timings, strict=True)
        ]
        num_rows = sum(record.num_decodes + record.num_prefill_tokens + record.num_drafts for record in records)
        num_sampled = sum(record.num_decodes + record.num_drafts for record in records)
        head_layers = lm_head_cost_layers(loaded.blueprint.model) * num_sampled / max(1, num_rows)
        return better_cut(_counts(loaded), step_s, head_layers, least_ratio)

    async def _moves(self, layers: Sequence[int], reason: MoveReason) -> AsyncIterator[MovedLayer]:
        """Raises ConfigurationError: the cut does not suit the pipeline; other errors: a stage was lost."""
        blueprint = self._group.loaded.blueprint
        if len(layers) != len(blueprint.layers):
            raise ConfigurationError(
                f"layers {tuple(layers)} are for {len(layers)} stages, not {len(blueprint.layers)}"
            )
        if min(layers) < 1:
            raise ConfigurationError(f"layers {tuple(layers)} leave a stage without layers")
        after = layer_ranges(explicit_partition(blueprint.model, tuple(layers)))
        for move in layer_moves(blueprint.layers, after):
            moved = await self._group.move_layer(move)
            self.totals.num_moved[reason] += 1
            self.totals.pause.observe(round(moved.pause_s * 1e9))
            logger.info("layer moved", extra=values(**_facts(moved), reason=reason))
            yield moved


def _note_end(error: Exception) -> None:
    logger.error("the stages are no longer kept in balance", exc_info=error)


def _counts(loaded: LoadedPipeline) -> tuple[int, ...]:
    return tuple(layers.num_layers for layers in loaded.blueprint.layers)


def _facts(moved: MovedLayer) -> dict[str, object]:
    return {
        "layer": moved.move.layer,
        "giver": moved.move.giver,
        "receiver": moved.move.receiver,
        "pause_ms": round(moved.pause_s * 1e3, 1),
        "took_s": round(moved.took_s, 3),
        "bytes_ahead": moved.num_bytes_ahead,
        "bytes_rest": moved.num_bytes_rest,
    }
