"""Moves lead from any cut to any other over whole cuts; the balance of stages decides when to make them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any, cast

import pytest

from gptj_dist.config import PipelineConfig
from gptj_dist.engine.plan import Chunk, Plan, Result, StageTiming
from gptj_dist.engine.stats import PipelineStats
from gptj_dist.errors import ConfigurationError, StageFailedError
from gptj_dist.planning.moves import LayerMove, layer_moves
from gptj_dist.planning.partition import layer_ranges, lm_head_cost_layers
from gptj_dist.planning.rebalance import FIRST_LOOKS, MOST_LOOKS, SETTLING_RATIO, SLOWEST_RATIO, Balance, better_cut
from gptj_dist.serving.layer_moves import MIN_PLANS, LayerMoves
from gptj_dist.stages.blueprint import DeviceReport, LoadedPipeline, draw_blueprint
from gptj_dist.stages.group import StageGroup
from gptj_dist.stages.relocation import MovedLayer
from gptj_dist.stages.room import foresee_reports, recut_reports, require_room


def device(pool: str) -> DeviceReport:
    return DeviceReport("cpu", pool, 4, 10**10, ("float32",))


def random_cut(chooser: random.Random, num_stages: int, num_layers: int) -> tuple[int, ...]:
    stops = [*sorted(chooser.sample(range(1, num_layers), num_stages - 1)), num_layers]
    return tuple(stop - start for start, stop in zip([0, *stops[:-1]], stops, strict=True))


def test_moves_lead_from_any_cut_to_any_other_by_one_layer_at_a_time() -> None:
    chooser = random.Random(0)
    for _ in range(300):
        num_stages = chooser.randrange(1, 6)
        before, after = (layer_ranges(random_cut(chooser, num_stages, 9)) for _ in range(2))
        present = before
        for move in layer_moves(before, after):
            assert move.before == present
            assert abs(move.giver - move.receiver) == 1
            layers = {stage: set(range(each.start, each.stop)) for stage, each in enumerate(present)}
            layers[move.giver].remove(move.layer)
            layers[move.receiver].add(move.layer)
            present = move.after
            assert all(layers.values())
            assert layers == {stage: set(range(each.start, each.stop)) for stage, each in enumerate(present)}
        assert present == after


def test_there_are_as_many_moves_as_the_borders_shift_by_layers() -> None:
    assert len(layer_moves(layer_ranges((7, 7, 7, 7)), layer_ranges((8, 7, 7, 6)))) == 3
    assert layer_moves(layer_ranges((3, 4)), layer_ranges((3, 4))) == []
    with pytest.raises(ValueError, match="cannot become"):
        layer_moves(layer_ranges((3, 4)), layer_ranges((7,)))


def test_half_the_speed_is_half_the_layers() -> None:
    found = better_cut((14, 14), (2.0, 1.0), head_layers=0)
    assert found is not None
    assert (found.layers, found.slowest) == ((9, 19), 0)
    assert found.ratio == pytest.approx(2)
    assert found.gain == pytest.approx(1 - 19 / 28)
    with_head = better_cut((14, 14), (2.0, 1.0), head_layers=28)  # which takes most of the last stage's time
    assert with_head is not None
    assert with_head.layers == (8, 20)


@pytest.mark.parametrize(
    ("layers", "step_s"),
    [
        ((14, 14), (1.1, 1.0)),  # less than 15 %
        ((1, 1), (9.0, 1.0)),  # nothing to give
        ((3, 2), (1.2, 1.0)),  # another cut would be worse
        ((28,), (1.0,)),
        ((14, 14), (1.0, 0.0)),  # not measured
    ],
)
def test_layers_stay_where_another_cut_gains_too_little(layers: tuple[int, ...], step_s: tuple[float, ...]) -> None:
    assert better_cut(layers, step_s, head_layers=0) is None


def test_the_better_cut_is_in_balance_itself() -> None:
    """So layers do not move to and fro, whatever the speeds are."""
    chooser = random.Random(1)
    for _ in range(300):
        num_stages = chooser.randrange(2, 6)
        cut, head = random_cut(chooser, num_stages, 28), chooser.choice((0.0, 1.03, 4.1))
        layer_s = [chooser.uniform(0.5, 2) for _ in range(num_stages)]

        def step_s(layers: Sequence[int], head: float = head, layer_s: Sequence[float] = layer_s) -> list[float]:
            heads = [0.0] * (len(layers) - 1) + [head]
            return [each * (count + more) for each, count, more in zip(layer_s, layers, heads, strict=True)]

        if (found := better_cut(cut, step_s(cut), head)) is not None:
            assert max(step_s(found.layers)) == pytest.approx((1 - found.gain) * max(step_s(cut)))
            assert better_cut(found.layers, step_s(found.layers), head, SETTLING_RATIO) is None


def test_patience_doubles_and_a_look_at_another_stage_begins_anew() -> None:
    balance = Balance()
    assert not any(balance.note(slowest) for slowest in (0, 0, 1, 0, None, 0, 0))
    assert balance.note(0)
    waits = []
    for _ in range(6):
        balance.note_new_cut()
        waits.append(next(number for number in count(1) if balance.note(0)))
    assert waits == [2 * FIRST_LOOKS, 4 * FIRST_LOOKS, MOST_LOOKS, MOST_LOOKS, MOST_LOOKS, MOST_LOOKS]


def test_stages_in_balance_never_move() -> None:
    balance = Balance()
    assert not any(balance.note(None) for _ in range(4 * MOST_LOOKS))


def test_after_a_move_the_stages_settle_more_closely_until_they_are_in_balance() -> None:
    balance = Balance()
    nearly = ((11, 17), (1.14, 1.0), 0)
    assert better_cut(*nearly, balance.least_ratio) is None
    balance.note_new_cut()
    found = better_cut(*nearly, balance.least_ratio)
    assert found is not None
    assert found.layers == (10, 18)
    for _ in range(FIRST_LOOKS):
        balance.note(None)
    assert balance.least_ratio == SLOWEST_RATIO


def loaded(layers: tuple[int, ...], free_bytes: int = 10**9) -> LoadedPipeline:
    blueprint = draw_blueprint(PipelineConfig("demo", layers=layers))
    devices = [device(f"host-{stage}/cpu") for stage in range(len(layers))]
    reports = foresee_reports(
        blueprint, ["cpu"] * len(layers), devices, {each.memory_pool: free_bytes for each in devices}
    )
    return LoadedPipeline(blueprint, reports, num_blocks=64)


def test_a_cut_needs_room_for_the_kv_cache_that_there_is() -> None:
    pipeline = loaded((14, 14))
    require_room(pipeline, layer_ranges((1, 27)))
    kv_bytes = pipeline.reports[1].kv_bytes_per_token // 14 * pipeline.num_kv_tokens
    weights = pipeline.reports[1].weight_bytes
    for num_layers, fits in ((15, True), (16, False)):
        grown = recut_reports(pipeline.blueprint.model, pipeline.reports, layer_ranges((28 - num_layers, num_layers)))
        needed = 15 * kv_bytes + weights // 14  # of one more layer, and a part of lm_head
        tight = replace(pipeline, reports=tuple(replace(each, free_bytes=needed) for each in pipeline.reports))
        assert grown[1].layers.num_layers == num_layers
        if fits:
            require_room(tight, layer_ranges((28 - num_layers, num_layers)))
        else:
            with pytest.raises(ConfigurationError, match="the cut 12,16 has room for"):
                require_room(tight, layer_ranges((28 - num_layers, num_layers)))


def test_without_blocks_layers_stay() -> None:
    pipeline = loaded((14, 14))
    regions = replace(pipeline, reports=tuple(replace(each, has_blocks=False) for each in pipeline.reports))
    with pytest.raises(ConfigurationError, match="no C compiler"):
        require_room(regions, layer_ranges((13, 15)))


def test_layers_stay_where_the_neighbour_keeps_its_kv_in_another_form() -> None:
    pipeline = loaded((9, 9, 10))
    mixed = replace(pipeline, reports=(*pipeline.reports[:2], replace(pipeline.reports[2], kind="cuda")))
    require_room(mixed, layer_ranges((8, 10, 10)))
    with pytest.raises(ConfigurationError, match="between stage 1 on a cpu and stage 2 on a cuda device"):
        require_room(mixed, layer_ranges((9, 10, 9)))


def test_memory_that_stages_share_does_not_change_when_layers_move() -> None:
    pipeline = loaded((14, 14))
    shared = [replace(each, device=device("host/cpu")) for each in pipeline.reports]
    recut = recut_reports(pipeline.blueprint.model, shared, layer_ranges((4, 24)))
    assert [each.free_bytes for each in recut] == [each.free_bytes for each in shared]
    assert sum(each.kv_bytes_per_token for each in recut) == sum(each.kv_bytes_per_token for each in shared)
    assert recut[0].weight_bytes < shared[0].weight_bytes


class FakeGroup:
    """Stages that take layers at once; fails at the given move."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.loaded = loaded((14, 14))
        self.moves: list[LayerMove] = []
        self._fails_at = fails_at

    async def move_layer(self, move: LayerMove) -> MovedLayer:
        if len(self.moves) == self._fails_at:
            raise StageFailedError("a stage was lost")
        self.moves.append(move)
        self.loaded = replace(self.loaded, blueprint=replace(self.loaded.blueprint, layers=move.after))
        return MovedLayer(move, 0.004, 0.2, 1000, 10)


def layer_moves_of(group: FakeGroup, stats: PipelineStats | None = None) -> LayerMoves:
    return LayerMoves("p", cast("StageGroup", group), stats or PipelineStats(lambda: 0))


def test_a_new_cut_is_reached_and_told_layer_by_layer() -> None:
    group = FakeGroup()
    moves = layer_moves_of(group)
    recut = asyncio.run(moves.recut((12, 16)))
    assert (recut.layers, recut.problem, len(recut.moved)) == ((12, 16), None, 2)
    assert moves.totals.num_moved == {"asked": 2}
    assert moves.totals.pause.sum_ns == 8_000_000
    told: Any = recut.as_json()
    assert told["moved"][0] == {
        "layer": 13, "giver": 0, "receiver": 1, "pause_ms": 4.0, "took_s": 0.2, "bytes_ahead": 1000, "bytes_rest": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ((28,), "are for 1 stages, not 2"),
        ((0, 28), "leave a stage without layers"),
        ((14, 13), "add up to 27, but the model has 28"),
    ],
)
def test_a_cut_that_does_not_suit_is_refused(layers: tuple[int, ...], problem: str) -> None:
    group = FakeGroup()
    recut = asyncio.run(layer_moves_of(group).recut(layers))
    assert recut.is_refused
    assert problem in str(recut.problem)
    assert group.moves == []


def test_a_loss_on_the_way_is_told_with_the_cut_that_there_is() -> None:
    recut = asyncio.run(layer_moves_of(FakeGroup(fails_at=1)).recut((12, 16)))
    assert (recut.layers, recut.problem, len(recut.moved)) == ((13, 15), "a stage was lost", 1)
    assert not recut.is_refused


class Plans:
    """Plans of one decoded token, one after another, on a clock that stands still between them."""

    def __init__(self) -> None:
        self._now_ns = 0
        self.stats = PipelineStats(lambda: self._now_ns)

    def add(self, step_ms: Sequence[float], busy: float = 1.0) -> None:
        """Plans for one look.

        Args:
            step_ms: of each stage.
            busy: share of the time in which the stages compute.
        """
        for _ in range(MIN_PLANS):
            number, begin_ns, timings = self.stats.num_plans, self._now_ns, []
            self.stats.note_submitted(Plan(number, (), (), (Chunk(0, number, (1,), (), samples=True),)), begin_ns)
            for each in step_ms:
                timings.append(StageTiming(self._now_ns, self._now_ns + round(each * 1e6)))
                self._now_ns += round(each / busy * 1e6)
            self.stats.note_landed(Result(number, (1,), tuple(timings)), self._now_ns)


def stats_of(step_ms: Sequence[float], busy: float = 1.0) -> PipelineStats:
    plans = Plans()
    plans.add(step_ms, busy)
    return plans.stats


def test_a_look_compares_the_steps_of_the_stages() -> None:
    busy, idle, even = stats_of((9, 1)), stats_of((9, 1), busy=0.2), stats_of((2, 2))
    found = layer_moves_of(FakeGroup(), busy).look(busy.records(), SLOWEST_RATIO)
    assert found is not None
    assert found.slowest == 0
    assert found.layers[0] < 14
    assert layer_moves_of(FakeGroup(), idle).look(idle.records(), SLOWEST_RATIO) is None
    assert layer_moves_of(FakeGroup(), even).look(even.records(), SLOWEST_RATIO) is None


@pytest.mark.parametrize("looks", [(1.2, 2.8, 2.0), (2.8, 2.0, 1.2), (2.0, 2.0, 2.0)])
def test_the_cut_comes_from_all_plans_of_the_looks_in_a_row(looks: Sequence[float], monkeypatch: Any) -> None:
    """One look sees few plans, and those of one moment."""
    monkeypatch.setattr("gptj_dist.serving.layer_moves.LOOK_S", 0)

    async def run() -> tuple[int, ...]:
        group, plans = FakeGroup(), Plans()
        keeping = asyncio.create_task(layer_moves_of(group, plans.stats).keep_balance())
        for slow_ms in (1.0, *looks):
            await asyncio.sleep(0)
            assert not group.moves
            plans.add((slow_ms, 1.0))
        for _ in range(4):  # for the look, and the task that moves all layers
            await asyncio.sleep(0)
        keeping.cancel()
        return tuple(each.num_layers for each in group.loaded.blueprint.layers)

    head_layers = lm_head_cost_layers(FakeGroup().loaded.blueprint.model)
    expected = better_cut((14, 14), (2.0, 1.0), head_layers)
    assert expected is not None
    assert asyncio.run(asyncio.wait_for(run(), 60)) == expected.layers


def test_plans_of_an_earlier_cut_do_not_count_for_the_one_that_somebody_has_asked_for(monkeypatch: Any) -> None:
    """Looks at the first cut would make of (11, 17), whose first stage is slower by a half, something far from it."""
    monkeypatch.setattr("gptj_dist.serving.layer_moves.LOOK_S", 0)

    async def run() -> tuple[int, ...]:
        group, plans = FakeGroup(), Plans()
        moves = layer_moves_of(group, plans.stats)
        keeping = asyncio.create_task(moves.keep_balance())
        for _ in range(FIRST_LOOKS - 1):
            await asyncio.sleep(0)
            plans.add((9.0, 1.0))
        await moves.recut((11, 17))
        while len(group.moves) == 3:
            plans.add((1.5, 1.0))
            await asyncio.sleep(0)
        for _ in range(4):  # for the rest of the layers
            await asyncio.sleep(0)
        keeping.cancel()
        return tuple(each.num_layers for each in group.loaded.blueprint.layers)

    expected = better_cut((11, 17), (1.5, 1.0), lm_head_cost_layers(FakeGroup().loaded.blueprint.model))
    assert expected is not None
    assert asyncio.run(asyncio.wait_for(run(), 60)) == expected.layers


def test_layers_go_on_moving_when_nobody_waits_for_them_any_more() -> None:
    async def run() -> tuple[int, ...]:
        group = FakeGroup()
        moves = layer_moves_of(group)
        asking = asyncio.create_task(moves.recut((12, 16)))
        await asyncio.sleep(0)
        asking.cancel()
        return (await moves.recut((12, 16))).layers

    assert asyncio.run(run()) == (12, 16)
