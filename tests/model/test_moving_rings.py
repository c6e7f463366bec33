"""Layers move over real rings while requests of all kinds run; and whenever a ring ends, its stages agree on a cut."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.record import new_records
from gptj_dist.errors import StageFailedError
from gptj_dist.planning.moves import LayerMove, layer_moves
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.stages import group as group_module
from gptj_dist.stages.relocation import MovedLayer, carry_out
from gptj_dist.stages.ring import Ring
from gptj_dist.stages.transport.frames import FrameFault, FrameFaultError
from tests.model import test_frame_faults
from tests.model.test_frame_faults import Threads
from tests.model.test_survival import REQUESTS, collect

threads = test_frame_faults.threads
undisturbed = test_frame_faults.undisturbed

Commit = Callable[[], None]

PHASES = (("prepare_move", "receiver"), ("send_ahead", "giver"), ("switch", "ring"), ("end_move", "receiver"))
"""Calls before which the ring ends, and whose they are."""


def next_move(threads: Threads) -> LayerMove:
    """To and fro, so that each of the two stages gives and takes."""
    present = threads.group.loaded.blueprint.layers
    first = 14 if present[0].stop == 13 else 13
    [move] = layer_moves(present, layer_ranges((first, 28 - first)))
    return move


async def told_meanwhile(threads: Threads, work: Coroutine[Any, Any, None]) -> list[list[list[object]]]:
    """What all requests tell, again and again, while the work is done."""
    engine = AsyncEngine(threads.group.loaded.make_scheduler(), threads.group, threads.group.loaded.limits())
    driver, working = asyncio.create_task(threads.drive(engine)), asyncio.create_task(work)
    told: list[list[list[object]]] = []
    while not working.done():
        streams = [
            stream
            for prompt_ids, params, num_choices in REQUESTS
            for stream in engine.generate_all(new_records(prompt_ids, params, num_choices))
        ]
        told.append(await asyncio.gather(*map(collect, streams)))
    driver.cancel()
    await asyncio.gather(driver, return_exceptions=True)
    await threads.join()
    await working
    return told


def test_streams_do_not_notice_that_layers_move(threads: Threads, undisturbed: list[list[object]]) -> None:
    moved: list[MovedLayer] = []

    async def move() -> None:
        while len(moved) < 8 or not any(each.num_bytes_rest for each in moved):
            moved.append(await threads.group.move_layer(next_move(threads)))

    told = threads.run(told_meanwhile(threads, move()))
    assert told == [undisturbed] * len(told)
    assert {each.move.giver for each in moved} == {0, 1}
    assert any(each.num_bytes_ahead for each in moved)
    assert all(each.pause_s >= 0 and each.took_s > 0 for each in moved)
    assert threads.num_stages_started == 2


class Interrupter:
    """An actor or a ring that ends the present ring before a call."""

    def __init__(self, inner: Any, method: str, ring: Ring) -> None:
        self._inner, self._method, self._ring = inner, method, ring

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self._ring._note_fault(0, FrameFaultError(FrameFault.MISSING, "by the test"))
        return getattr(self._inner, name)


async def interrupted(
    phase: tuple[str, str], move: LayerMove, giver: Any, receiver: Any, ring: Ring, commit: Commit
) -> MovedLayer:
    """`carry_out`, in which the ring ends before one of the calls."""
    method, whose = phase
    parts = {"giver": giver, "receiver": receiver, "ring": ring}
    parts[whose] = Interrupter(parts[whose], method, ring)
    return await carry_out(move, parts["giver"], parts["receiver"], parts["ring"], commit)


def test_stages_agree_on_a_cut_whenever_their_ring_ends(
    threads: Threads, undisturbed: list[list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser, ends = random.Random(0), []

    async def move() -> None:
        for phase in chooser.sample(PHASES, len(PHASES)) * 2:
            monkeypatch.setattr(group_module, "carry_out", partial(interrupted, phase))
            wanted, epoch = next_move(threads), threads.epoch
            try:
                await threads.group.move_layer(wanted)
            except StageFailedError:
                ends.append(threads.group.loaded.blueprint.layers == wanted.before)
            else:
                ends.append(threads.group.loaded.blueprint.layers == wanted.after)
            while threads.epoch == epoch or threads.group._present_ring.is_closed:  # noqa: ASYNC110  # run() has a limit
                await asyncio.sleep(0.01)
            monkeypatch.setattr(group_module, "carry_out", carry_out)
            await threads.group.move_layer(next_move(threads))

    told = threads.run(told_meanwhile(threads, move()))
    assert told == [undisturbed] * len(told)
    assert ends == [True] * 8
    assert [stage.layers for stage in threads.group.loaded.reports] == list(threads.group.loaded.blueprint.layers)
    assert threads.num_stages_started == 2
