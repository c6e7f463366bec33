"""Whatever a network does to frames, every stream tells the bits that it would have told, and no stage is replaced."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import ray

from gptj_dist import garbage
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.record import new_records
from gptj_dist.errors import StageFailedError
from gptj_dist.placement import StageResources
from gptj_dist.stages import actor, group, ring
from gptj_dist.stages.actor import Stage
from gptj_dist.stages.blueprint import draw_blueprint
from gptj_dist.stages.group import Placement, StageGroup
from gptj_dist.stages.transport.frames import FrameFault
from tests import faulty_transport as faulty
from tests.faulty_transport import Fault, FaultyNetwork, FaultyTransport
from tests.model.test_survival import CONFIG, REQUESTS, collect

TIMEOUT_S = 120
COORDINATOR_TO_0, FROM_0_TO_1, FROM_1_TO_COORDINATOR = EDGES = range(3)

T = TypeVar("T")


class FaultyStage(Stage):
    """A stage that sends over a faulty network."""

    network: FaultyNetwork

    def _open(self, epoch: int) -> None:
        super()._open(epoch)
        self._transport = FaultyTransport(epoch, self.network, self._runner._spec.layers.stage + 1)


class ThreadActor:
    """A stage on threads of this process, called as Ray's actors are."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._threads = {name: ThreadPoolExecutor(1) for name in ("run", "progress", "moves")}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stage, name)
        thread = self._threads[getattr(method, "__ray_concurrency_group__", "progress")]
        return SimpleNamespace(remote=lambda *args: asyncio.wrap_future(thread.submit(method, *args)))


class Threads:
    """A pipeline whose stages are threads: its real group, rings and stages, over a faulty network."""

    def __init__(self) -> None:
        self.network = FaultyNetwork()
        self.num_stages_started = 0
        self.epoch = 0
        self.group: StageGroup
        self._runner = asyncio.Runner()

    def start_stage(self, *_: object) -> ThreadActor:
        self.num_stages_started += 1
        stage = FaultyStage()
        stage.network = self.network
        return ThreadActor(stage)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the pipeline's event loop."""

        async def limited() -> T:
            async with asyncio.timeout(TIMEOUT_S):
                return await work

        return self._runner.run(limited())

    async def open(self) -> None:
        placement: Any = Placement(None, (StageResources("cpu", 1, 0),) * CONFIG.num_stages, "app::pipeline")
        blueprint = draw_blueprint(replace(CONFIG, threads_per_stage=1))
        self.group, self.loaded = await StageGroup.start(blueprint, placement, self.epoch)

    async def told(self, requests: Sequence[Any], faults: Sequence[tuple[int, int, Fault]]) -> list[list[object]]:
        """What requests tell while the network does this."""
        self.network.faults = list(faults)
        engine = AsyncEngine(self.loaded.make_scheduler(), self.group, self.loaded.limits())
        driver = asyncio.create_task(self.drive(engine))
        streams = [
            stream
            for prompt_ids, params, num_choices in requests
            for stream in engine.generate_all(new_records(prompt_ids, params, num_choices))
        ]
        told = await asyncio.gather(*map(collect, streams))
        driver.cancel()
        await self.join()
        return told

    async def drive(self, engine: AsyncEngine) -> None:
        """Runs the engine, and joins the next ring when one ends."""
        while True:
            try:
                await engine.run()
            except StageFailedError:
                assert await self.group.losses() == []
                await self.join()
                engine.resume(self.loaded.make_scheduler(), self.group, self.loaded.limits())

    async def join(self) -> None:
        """Joins the stages to the next ring."""
        self.epoch += 1
        self.loaded = await self.group.join(self.epoch)


async def no_nodes() -> frozenset[str]:
    return frozenset()


@pytest.fixture(scope="module")
def threads() -> Iterator[Threads]:
    made = Threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
        patch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
        patch.setattr(ray, "kill", lambda _: None)
        patch.setattr(actor, "claim_cores", lambda _: None)
        patch.setattr(garbage, "settle", lambda: None)
        patch.setattr(group, "stage_actor", lambda *_: SimpleNamespace(remote=made.start_stage))
        patch.setattr(group, "node_doors", dict)
        patch.setattr(group, "DrainedNodes", lambda: SimpleNamespace(ask=no_nodes))
        patch.setattr(group, "open_transport", lambda epoch: FaultyTransport(epoch, made.network, COORDINATOR_TO_0))
        made.run(made.open())
        yield made
        made.run(made.group.stop())


@pytest.fixture(scope="module")
def undisturbed(threads: Threads) -> list[list[object]]:
    told = threads.run(threads.told(REQUESTS, []))
    assert not threads.group.num_faults
    return told


def on_each_edge(*faults: Fault) -> list[tuple[int, int, Fault]]:
    """The faults happen to successive messages, on each edge in an epoch of its own."""
    return [(edge, 4 + edge + index, fault) for edge in EDGES for index, fault in enumerate(faults)]


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (on_each_edge(faulty.lose), FrameFault.MISSING),
        (on_each_edge(faulty.lose, faulty.send_late), FrameFault.MISSING),
        (on_each_edge(faulty.double), FrameFault.REPEATED),
        (on_each_edge(faulty.corrupt_header), FrameFault.CORRUPTED),
        (on_each_edge(faulty.corrupt_hidden_states), FrameFault.CORRUPTED),
        (on_each_edge(faulty.flip_bit), FrameFault.CORRUPTED),
        (on_each_edge(faulty.cut_off), FrameFault.CORRUPTED),
    ],
    ids=["lost", "overtaken", "doubled", "header", "hidden states", "one bit", "cut off"],
)
def test_no_fault_changes_a_stream_and_each_is_counted_on_its_edge(
    threads: Threads,
    undisturbed: list[list[object]],
    faults: list[tuple[int, int, Fault]],
    expected: FrameFault,
) -> None:
    before, epoch = Counter(threads.group.num_faults), threads.epoch
    assert threads.run(threads.told(REQUESTS, faults)) == undisturbed
    assert not threads.network.faults
    assert Counter(threads.group.num_faults) - before == {(edge, expected): 1 for edge in EDGES}
    assert threads.epoch == epoch + len(EDGES) + 1
    assert threads.num_stages_started == CONFIG.stages


def test_stale_frames_are_dropped(threads: Threads, undisturbed: list[list[object]]) -> None:
    before, epoch = Counter(threads.group.num_faults), threads.epoch
    assert threads.run(threads.told(REQUESTS, on_each_edge(faulty.replay_stale))) == undisturbed
    assert not threads.network.faults
    assert (threads.group.num_faults, threads.epoch) == (before, epoch + 1)


@pytest.mark.parametrize("edge", EDGES)
def test_the_loss_of_a_frame_that_no_other_one_follows_is_found_by_silence(
    threads: Threads, undisturbed: list[list[object]], monkeypatch: pytest.MonkeyPatch, edge: int
) -> None:
    monkeypatch.setattr(ring, "PERIOD_S", 0.1)
    before = Counter(threads.group.num_faults)
    assert threads.run(threads.told(REQUESTS[-1:], [(edge, 9, faulty.lose)])) == undisturbed[-1:]
    assert Counter(threads.group.num_faults) - before == {(edge, FrameFault.MISSING): 1}
    assert threads.num_stages_started == CONFIG.stages
