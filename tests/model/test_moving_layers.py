"""Requests tell, in float32, the same bits whether layers move between the stages or not."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.manifest import stage_spans
from gptj_dist.config import LayerRange, ModelConfig, PipelineConfig
from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.plan import Plan, Result
from gptj_dist.engine.record import new_records
from gptj_dist.params import Grammar, SamplingParams
from gptj_dist.planning.moves import LayerMove, layer_moves
from gptj_dist.stages import local
from gptj_dist.stages.load_progress import LoadProgress
from gptj_dist.stages.local import LocalExecutor, load_local
from gptj_dist.stages.moving import MoveReport, StageMover
from gptj_dist.stages.runner import StageRunner
from tests.adapters import chosen, write_lora
from tests.model import test_survival
from tests.model.test_survival import PROMPT, REQUESTS, collect

adapted = test_survival.adapted
CONFIG = replace(test_survival.CONFIG, stages=3)


class MovingStages:
    """An executor whose layers take a random walk while it computes.

    A layer is loaded and sent ahead on threads beside the one that computes, during a random number of plans.

    Args:
        seed: of the walk; None for no walk.

    Attributes:
        reports: of the givers.
    """

    def __init__(self, config: PipelineConfig, seed: int | None) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._beside = ThreadPoolExecutor(2)
        self.pipeline, self.runners = self._thread.submit(load_local, config).result()
        self._executor = LocalExecutor(self.runners, self._thread)
        self._movers = [StageMover(runner) for runner in self.runners]
        self._chooser = None if seed is None else random.Random(seed)
        self._move: LayerMove | None = None
        self._ahead: list[Future[None]] = []
        self._num_plans_left = 0
        self._steps: list[Future[None]] = []
        self.reports: list[MoveReport] = []

    def submit(self, plan: Plan) -> None:
        if self._chooser is not None:
            self._steps.append(self._thread.submit(self._walk, self._chooser))
        self._executor.submit(plan)

    async def receive(self) -> Result:
        return await self._executor.receive()

    def close(self) -> None:
        """Raises what a move has raised."""
        for step in self._steps:
            step.result()
        self._executor.close()
        self._beside.shutdown()

    @property
    def cut(self) -> tuple[LayerRange, ...]:
        return tuple(runner.layers for runner in self.runners)

    def _walk(self, chooser: random.Random) -> None:
        """Begins a move, or ends it when it is due. Between two plans, on the thread that computes."""
        if self._move is None:
            self._begin(random_move(self.cut, chooser))
            self._num_plans_left = chooser.randrange(4)
        elif self._num_plans_left:
            self._num_plans_left -= 1
        else:
            self._end(self._move)

    def _begin(self, move: LayerMove) -> None:
        giver, receiver = self._movers[move.giver], self._movers[move.receiver]
        address = self._beside.submit(receiver.prepare, move, "127.0.0.1").result()
        self._ahead = [self._beside.submit(giver.send_ahead, move, address), self._beside.submit(receiver.take_ahead)]
        self._move = move

    def _end(self, move: LayerMove) -> None:
        for ahead in self._ahead:
            ahead.result()
        self._switch(move, 0)
        _, report = (self._movers[stage].end() for stage in (move.receiver, move.giver))
        self.reports.append(report)
        assert self.cut == move.after
        self._move = None

    def _switch(self, move: LayerMove, stage: int) -> None:
        if stage < len(self._movers):
            self._movers[stage].switch(move, partial(self._switch, move, stage + 1))


def random_move(cut: tuple[LayerRange, ...], chooser: random.Random) -> LayerMove:
    """Of one layer, anywhere."""
    stops = [layers.stop for layers in cut]
    while True:
        edge = chooser.randrange(len(cut) - 1)
        wanted = [*stops]
        wanted[edge] += chooser.choice((-1, 1))
        starts = [0, *wanted[:-1]]
        if all(start < stop for start, stop in zip(starts, wanted, strict=True)):
            after = [
                LayerRange(i, len(cut), start, stop) for i, (start, stop) in enumerate(zip(starts, wanted, strict=True))
            ]
            [move] = layer_moves(cut, after)
            return move


class PartialFiles:
    """A copy of the demo's files with zeros in place of tensors that were not fetched, as on a node without the model.

    Implements `ModelFiles`.

    Args:
        directory: of the copy.
    """

    def __init__(self, directory: Path) -> None:
        self._whole = resolve_model("demo")
        self._directory = shutil.copytree(self._whole, directory)
        self._copy(LayerRange.whole(read_model_config(self._whole).num_layers), bytes)

    def directory(self) -> Path:
        return self._directory

    def fetch(self, config: ModelConfig, layers: LayerRange, on_progress: Callable[[LoadProgress], None]) -> None:  # noqa: ARG002
        self._copy(layers, None)

    def _copy(self, layers: LayerRange, fill: Callable[[int], bytes] | None) -> None:
        for name, spans in stage_spans(self._whole, read_model_config(self._whole), layers).items():
            with (self._whole / name).open("rb") as whole, (self._directory / name).open("r+b") as copy:
                for begin, end in spans:
                    here = os.pread(whole.fileno(), end - begin, begin) if fill is None else fill(end - begin)
                    os.pwrite(copy.fileno(), here, begin)


async def told(
    config: PipelineConfig, adapted: SamplingParams, seed: int | None
) -> tuple[list[list[object]], MovingStages, AsyncEngine]:
    """What all requests tell. Some come when others are under way."""
    stages = MovingStages(config, seed)
    engine = AsyncEngine(stages.pipeline.make_scheduler(), stages, stages.pipeline.limits())
    works = (
        *REQUESTS,
        (PROMPT[3:], adapted, 2),
        (PROMPT[4:], replace(adapted, structured_outputs=Grammar("regex", "[a-z ]{9,}"), logprobs=1), 1),
        (PROMPT[:9], replace(adapted, use_beam_search=True, n=2), 1),
        *REQUESTS,  # again, with KV and texts that are known
    )
    streams = [
        stream
        for prompt_ids, params, num in works
        for stream in engine.generate_all(new_records(prompt_ids, params, num))
    ]
    driver = asyncio.create_task(engine.run())
    answers = await asyncio.gather(*map(collect, streams))
    driver.cancel()
    engine.scheduler.check_integrity()
    stages.close()
    return answers, stages, engine


@pytest.fixture(scope="module")
def expected(adapted: SamplingParams) -> list[list[object]]:
    """Without moves and drafts."""
    return asyncio.run(told(replace(CONFIG, speculation=False), adapted, None))[0]


def test_layers_may_move_at_any_time(expected: list[list[object]], adapted: SamplingParams) -> None:
    answers, stages, engine = asyncio.run(told(CONFIG, adapted, seed=0))
    assert answers == expected
    assert len(stages.reports) > 10
    assert any(report.num_bytes_ahead for report in stages.reports)
    assert any(report.num_bytes_rest for report in stages.reports)
    assert engine.scheduler.num_preemptions > 0
    assert engine.stats.num_accepted > 0


def test_an_adapter_that_depends_on_weights_of_a_layer_that_joins_is_read_when_these_were_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = read_model_config(resolve_model("demo"))
    path = write_lora(tmp_path / "dora", model, ("attn.q_proj",), use_dora=True)
    source = chosen(path, model).source
    assert source is not None
    gains = []
    for make in (StageRunner, lambda spec: StageRunner(spec, PartialFiles(tmp_path / str(spec.layers.stage)))):
        monkeypatch.setattr(local, "StageRunner", make)
        _, (runner, _) = load_local(test_survival.CONFIG)
        runner.load_adapter(source)
        stop = runner.layers.stop
        runner.load_layer(stop, replace(runner.layers, stop=stop + 1))
        assert runner._next_adapters is not None
        gains.append([tensors[3] for _, tensors in runner._next_adapters._held[source].parts])
        assert len(gains[-1]) == stop + 1
    for here, there in zip(*gains, strict=True):
        assert here is not None
        assert there is not None
        assert torch.equal(here, there)
