"""Layers move between actors while streams run: the same tokens, and a whole cut whichever stage dies meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from gptj_dist.config import PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.errors import ConfigurationError, GPTJDistError, StageFailedError
from gptj_dist.params import SamplingParams
from gptj_dist.planning.moves import LayerMove, layer_moves
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.stages import group as group_module
from gptj_dist.stages.group import StageGroup
from gptj_dist.stages.relocation import MovedLayer, carry_out
from gptj_dist.stages.ring import Ring
from tests.http.server import local_ray
from tests.ray.test_actors import rejoined, running_group

pytestmark = pytest.mark.ray

Commit = Callable[[], None]

PARAMS = SamplingParams(max_tokens=150, ignore_eos=True, seed=3)
PROMPTS = ([1, 2, 3], [4] * 40, [7, 8] * 30)
CONFIG = PipelineConfig("demo", stages=3, dtype="float32", speculation=False, prefix_cache=False)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray():
        yield


async def tokens(engine: AsyncEngine, prompt: list[int]) -> tuple[int, ...]:
    deltas = [delta async for delta in engine.generate(prompt, PARAMS)]
    return tuple(token for delta in deltas for token in delta.token_ids)


def all_tokens(engine: AsyncEngine) -> asyncio.Future[list[tuple[int, ...]]]:
    return asyncio.gather(*(tokens(engine, prompt) for prompt in PROMPTS))


def moves_to(group: StageGroup, *layers: int) -> list[LayerMove]:
    return layer_moves(group.loaded.blueprint.layers, layer_ranges(layers))


def cut(group: StageGroup) -> tuple[int, ...]:
    return tuple(report.layers.num_layers for report in group.loaded.reports)


def test_streams_do_not_notice_that_layers_move() -> None:
    async def run() -> None:
        async with running_group(CONFIG, epoch=100) as (group, engine, driver):
            expected, first = await all_tokens(engine), cut(group)
            moved: list[MovedLayer] = []
            while sum(move.num_bytes_rest for move in moved) == 0:  # until a step came between copy and switch
                telling = all_tokens(engine)
                for layers in ((first[0] + 1, *first[1:-1], first[-1] - 1), first):
                    moved += [await group.move_layer(move) for move in moves_to(group, *layers)]
                    assert cut(group) == layers
                assert await telling == expected
            assert {move.move.giver - move.move.receiver for move in moved} == {1, -1}
            assert sum(move.num_bytes_ahead for move in moved) > 0
            assert not driver.done()

    asyncio.run(run())


def test_a_cut_without_room_for_the_cache_is_refused_and_changes_nothing() -> None:
    async def run() -> None:
        async with running_group(CONFIG, epoch=110) as (group, engine, _):
            [move, *_] = moves_to(group, 1, 1, sum(cut(group)) - 2)
            before = cut(group)
            enough, group._loaded = group.loaded, _with_little_memory(group)
            with pytest.raises(ConfigurationError, match="has room for"):
                await group.move_layer(move)
            group._loaded = enough
            assert cut(group) == before
            await tokens(engine, [1])

    asyncio.run(run())


def _with_little_memory(group: StageGroup) -> Any:
    reports = [
        replace(report, free_bytes=0, device=replace(report.device, memory_pool=f"host/{index}"))
        for index, report in enumerate(group.loaded.reports)
    ]
    return replace(group.loaded, reports=tuple(reports))


class Saboteur:
    """An actor or a ring; calls `strike` before a call of the method."""

    def __init__(self, inner: Any, method: str, strike: Callable[[], None]) -> None:
        self._inner, self._method, self._strike = inner, method, strike

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self._strike()
        return getattr(self._inner, name)


async def _sabotaged(
    victim: int, method: str, whose: str, move: LayerMove, giver: Any, receiver: Any, ring: Ring, commit: Commit
) -> MovedLayer:
    """`carry_out`, in which a process is killed before the call of a method."""
    parts = {"giver": giver, "receiver": receiver, "ring": ring}
    parts[whose] = Saboteur(parts[whose], method, lambda: os.kill(victim, signal.SIGKILL))
    return await carry_out(move, parts["giver"], parts["receiver"], parts["ring"], commit)


PHASES: Mapping[str, Sequence[tuple[str, str, bool]]] = {
    "giver": (("send_ahead", "giver", False), ("switch", "ring", False), ("end_move", "giver", True)),
    "receiver": (("prepare_move", "receiver", False), ("switch", "ring", False), ("end_move", "receiver", False)),
}
"""For each stage that may die: which call is the next one, whose it is, and whether the layer has moved before it for
sure."""


@pytest.mark.parametrize("victim", PHASES)
def test_the_cut_is_a_whole_one_whichever_stage_dies_in_a_move(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_giver = victim == "giver"

    async def run() -> None:
        async with running_group(CONFIG, epoch=120 + 10 * is_giver) as (group, engine, driver):
            expected, first = await all_tokens(engine), cut(group)
            for number, (method, whose, has_moved) in enumerate(PHASES[victim]):
                wanted = (first[0] + 1, first[1] - 1, first[2]) if cut(group) == first else first
                [move] = moves_to(group, *wanted)
                pid = group._members[move.giver if is_giver else move.receiver].placed.process.pid

                sabotaged = partial(_sabotaged, pid, method, whose)
                monkeypatch.setattr(group_module, "carry_out", sabotaged)
                telling = all_tokens(engine)
                before = move.before
                moving = asyncio.create_task(group.move_layer(move))
                with pytest.raises(StageFailedError):
                    await asyncio.wait_for(driver, timeout=60)
                driver = await rejoined(group, engine, 121 + 10 * is_giver + number)
                result = (await asyncio.gather(moving, return_exceptions=True))[0]
                layers = group.loaded.blueprint.layers
                assert layers == (before if isinstance(result, BaseException) else move.after)
                assert isinstance(result, MovedLayer | GPTJDistError)
                assert not has_moved or layers == move.after
                assert await telling == expected
            driver.cancel()

    asyncio.run(run())
