"""float32 is the exact mode: the cut, the chunks, the company, preemption and threads change no bit of the logits."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import BLOCK_SIZE_TOKENS, LayerRange, ModelConfig
from gptj_dist.engine.plan import Plan, PromptLogprobs, Result
from gptj_dist.engine.record import noise_key
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.params import SamplingParams
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.quantization import Bits, Quantization
from gptj_dist.stages.blueprint import StageSpec
from gptj_dist.stages.runner import StageOutput, StageRunner
from gptj_dist.token_rules import TokenRules

pytestmark = pytest.mark.usefixtures("one_thread")

WHOLE = 10_000
"""Prompt tokens in a micro-batch: more than any test has."""
PLENTY = 400
"""KV blocks: more than any test needs."""
MAX_BATCH_SIZE = 17

ODD = ModelConfig(
    vocab_size=211,
    num_layers=14,
    d_model=75,
    num_heads=5,
    rotary_dim=6,
    d_ff=173,
    context_length=203,
    eos_token_ids=(3,),
)
"""Nothing is a multiple of anything: not heads of 15, not the inner row, not the context."""

WIDE = ModelConfig(
    vocab_size=97,
    num_layers=3,
    d_model=520,
    num_heads=4,
    rotary_dim=64,
    d_ff=2043,
    context_length=160,
    eos_token_ids=(3,),
)
"""Sums long enough for the matrix library to cut them: it does so otherwise for one row than for more."""


class RecordingRunner(StageRunner):
    """A stage that keeps what it gave to the sampler: one row of logits for each (request id, position).

    After a rejected draft, the row is replaced when the position comes again.
    """

    def __init__(self, spec: StageSpec) -> None:
        super().__init__(spec)
        self.logits: dict[tuple[int, int], Tensor] = {}

    def _compute(self, plan: Plan, hidden: Tensor | None) -> tuple[Tensor, tuple[PromptLogprobs, ...]]:
        output, told = super()._compute(plan, hidden)
        if self._spec.layers.is_last:
            sampled = [
                (chunk.request_id, chunk.start + chunk.num_known + number)
                for chunk in plan.chunks
                if chunk.samples
                for number in range(chunk.num_drafts + 1)
            ]
            for place, row in zip(sampled, output, strict=True):
                self.logits[place] = row.clone()
        return output, told


@dataclass(frozen=True)
class Work:
    """What one request asks for."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Run:
    """What came out: by request id, and by request id and position."""

    token_ids: dict[int, list[int]]
    logits: dict[tuple[int, int], Tensor]
    num_preemptions: int
    most_in_flight: int
    num_cached_tokens: int = 0
    num_evicted_blocks: int = 0
    num_accepted: int = 0


class Model:
    """A model whose pipelines are loaded once for each way to cut it.

    Args:
        bits: of its weights; None for those of the checkpoint.
    """

    def __init__(self, name: str, bits: Bits | None = None) -> None:
        self._name = name
        self.config = read_model_config(resolve_model(name))
        if bits is not None:
            self.config = self.config.quantized(Quantization.of_stages([self.config.num_layers], [bits]))
        self._runners: dict[tuple[int, ...], tuple[RecordingRunner, ...]] = {}

    def run(
        self,
        works: dict[int, Work],
        *,
        layers: Sequence[int] = (),
        max_chunk_tokens: int | None = WHOLE,
        num_blocks: int = PLENTY,
        max_batch_size: int = MAX_BATCH_SIZE,
        keeps_prefixes: bool = True,
        max_drafts: int = 0,
    ) -> Run:
        """Runs all requests to their ends, as many plans in flight as the scheduler will give.

        Args:
            layers: of each stage; all in one by default.
        """
        runners = self._load(tuple(layers) or (self.config.num_layers,))
        for runner in runners:
            runner.allocate(num_blocks)
            runner.logits.clear()
        scheduler = Scheduler(
            SchedulerConfig(
                num_stages=len(runners),
                num_blocks=num_blocks,
                block_size=BLOCK_SIZE_TOKENS,
                max_batch_size=max_batch_size,
                eos_token_ids=self.config.eos_token_ids,
                max_chunk_tokens=max_chunk_tokens,
                keeps_prefixes=keeps_prefixes,
                max_drafts=max_drafts,
            )
        )
        requests = [
            Request(id_, Prompt(work.prompt_ids), work.params, noise_key(work.params.seed, 0))
            for id_, work in sorted(works.items())
        ]
        for request in requests:
            scheduler.add(request)
        most_in_flight, num_accepted = _drive(scheduler, runners)
        return Run(
            token_ids={request.request_id: request.token_ids for request in requests},
            logits=dict(runners[-1].logits),
            num_preemptions=scheduler.num_preemptions,
            most_in_flight=most_in_flight,
            num_cached_tokens=sum(request.num_cached_tokens for request in requests),
            num_evicted_blocks=scheduler.pool.num_evicted,
            num_accepted=num_accepted,
        )

    def _load(self, layers: tuple[int, ...]) -> tuple[RecordingRunner, ...]:
        if layers not in self._runners:
            self._runners[layers] = tuple(RecordingRunner(self._spec(range_)) for range_ in layer_ranges(layers))
            for runner in self._runners[layers]:
                runner.load("float32", num_threads=None)
        return self._runners[layers]

    def _spec(self, layers: LayerRange) -> StageSpec:
        return StageSpec(
            model=self._name,
            revision=None,
            config=self.config,
            layers=layers,
            device="cpu",
            max_model_len=self.config.context_length,
            max_batch_size=MAX_BATCH_SIZE,
            rules=TokenRules(self.config.vocab_size, self.config.eos_token_ids, (5, self.config.vocab_size - 1)),
        )


def _drive(scheduler: Scheduler, runners: Sequence[StageRunner]) -> tuple[int, int]:
    """Keeps the pipeline full until all is done; returns the most plans that were in flight, and accepted drafts."""
    results: deque[Result] = deque()
    most_in_flight = num_accepted = 0
    while scheduler.has_requests:
        while (plan := scheduler.schedule()) is not None:
            results.append(_compute(plan, runners))
        most_in_flight = max(most_in_flight, scheduler.num_in_flight)
        scheduler.check_integrity()
        num_accepted += sum(results[0].num_accepted)
        scheduler.update(results.popleft())
    assert scheduler.num_used_blocks == 0
    return most_in_flight, num_accepted


def _compute(plan: Plan, runners: Sequence[StageRunner]) -> Result:
    output: StageOutput | Result | None = None
    for runner in runners:
        assert not isinstance(output, Result)
        output = runner.step(plan, output)
    assert isinstance(output, Result)
    return output


def _make_works(config: ModelConfig) -> dict[int, Work]:
    """Seventeen requests: prompts of 1 to 130 tokens, greedy and seeded, of 1 to 20 tokens of output."""
    chooser = random.Random(0)
    works = {}
    for id_, num_prompt_tokens in enumerate((37, 1, 130, 2, 7, 8, 9, 16, 63, 64, 65, 5, 33, 3, 21, 12, 90)):
        prompt = tuple(chooser.randrange(config.vocab_size) for _ in range(num_prompt_tokens))
        works[id_] = Work(prompt, _params(id_, chooser.randrange(1, 21) if id_ > 2 else 20))
    return works


def _params(id_: int, max_tokens: int) -> SamplingParams:
    kinds = (
        SamplingParams(max_tokens, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens, temperature=1.0, seed=id_, min_tokens=1),
        SamplingParams(max_tokens, temperature=0.7, top_p=0.9, top_k=40, seed=-id_, ignore_eos=True),
        SamplingParams(max_tokens, temperature=1.5, min_p=0.02, seed=2**40 + id_),
    )
    return kinds[id_ % len(kinds)]


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model("demo")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory: Path = tmp_path_factory.mktemp("odd")
    write_checkpoint(directory, ODD, seed=1, init_std=0.15)
    return Model(str(directory))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory: Path = tmp_path_factory.mktemp("wide")
    write_checkpoint(directory, WIDE, seed=1, init_std=0.05)
    return Model(str(directory))


def _alone(model: Model) -> Run:
    """Every request by itself, in one stage, on one thread, its prompt whole: what all else is compared with."""
    torch.set_num_threads(1)
    runs = [model.run({id_: work}) for id_, work in _make_works(model.config).items()]
    return Run(
        token_ids={id_: tokens for run in runs for id_, tokens in run.token_ids.items()},
        logits={key: row for run in runs for key, row in run.logits.items()},
        num_preemptions=0,
        most_in_flight=1,
    )


@pytest.fixture(scope="module")
def demo_alone(demo: Model) -> Run:
    return _alone(demo)


@pytest.fixture(scope="module")
def odd_alone(odd: Model) -> Run:
    return _alone(odd)


@pytest.fixture(scope="module")
def wide_alone(wide: Model) -> Run:
    return _alone(wide)


def _assert_same(run: Run, expected: Run) -> None:
    """Bits of logits first: they tell where it went wrong."""
    wrong = {
        key: float((row - expected.logits[key]).abs().max())
        for key, row in run.logits.items()
        if key in expected.logits and not torch.equal(row, expected.logits[key])
    }
    assert not wrong, f"{len(wrong)} of {len(run.logits)} rows differ, the first of them {min(wrong)}: {wrong}"
    assert run.logits.keys() <= expected.logits.keys()
    for id_, token_ids in run.token_ids.items():
        assert token_ids == expected.token_ids[id_]


def _cut(num_layers: int, num_stages: int) -> list[int]:
    """As even as can be, the longer ones last."""
    return [(i + 1) * num_layers // num_stages - i * num_layers // num_stages for i in range(num_stages)]


# A request by itself: stages, chunks and their sizes


@pytest.mark.parametrize(("num_stages", "max_chunk_tokens"), [(1, 1), (3, 64), (7, None), (28, 7)])
def test_a_lone_request_has_the_same_bits_however_it_is_cut(
    demo: Model, demo_alone: Run, num_stages: int, max_chunk_tokens: int | None
) -> None:
    works = _make_works(demo.config)
    for id_ in (0, 1, 2):
        run = demo.run({id_: works[id_]}, layers=_cut(28, num_stages), max_chunk_tokens=max_chunk_tokens)
        _assert_same(run, demo_alone)


# Seventeen requests at once: each as it was alone


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_change_no_bit(demo: Model, demo_alone: Run, num_stages: int) -> None:
    run = demo.run(_make_works(demo.config), layers=_cut(28, num_stages), max_chunk_tokens=None)
    assert run.most_in_flight == num_stages + 1
    _assert_same(run, demo_alone)


@pytest.mark.parametrize(("num_stages", "max_chunk_tokens"), [(3, 7), (2, 64), (1, WHOLE)])
def test_chunks_change_no_bit(demo: Model, demo_alone: Run, num_stages: int, max_chunk_tokens: int) -> None:
    run = demo.run(_make_works(demo.config), layers=_cut(28, num_stages), max_chunk_tokens=max_chunk_tokens)
    _assert_same(run, demo_alone)


@pytest.mark.parametrize(("num_stages", "max_chunk_tokens"), [(1, WHOLE), (2, 7), (7, 3)])
def test_preemption_changes_no_bit(demo: Model, demo_alone: Run, num_stages: int, max_chunk_tokens: int) -> None:
    run = demo.run(
        _make_works(demo.config), layers=_cut(28, num_stages), max_chunk_tokens=max_chunk_tokens, num_blocks=12
    )
    assert run.num_preemptions > 0
    _assert_same(run, demo_alone)


@pytest.mark.parametrize("model_name", ["demo", "odd", "wide"])
def test_threads_change_no_bit(model_name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(model_name)
    alone: Run = request.getfixturevalue(f"{model_name}_alone")
    works = _make_works(model.config)
    torch.set_num_threads(2)
    _assert_same(model.run({id_: works[id_] for id_ in (0, 2, 11)}), alone)
    _assert_same(model.run({2: works[2]}, layers=_cut(model.config.num_layers, 2), max_chunk_tokens=7), alone)


def test_uneven_stages_change_no_bit(demo: Model, demo_alone: Run) -> None:
    _assert_same(demo.run(_make_works(demo.config), layers=(1, 20, 3, 4)), demo_alone)


# The same for a model of odd sizes


@pytest.mark.parametrize(
    ("num_stages", "max_chunk_tokens", "num_blocks"),
    [(1, WHOLE, PLENTY), (1, 1, PLENTY), (2, 7, 12), (3, 64, PLENTY), (7, WHOLE, 12), (14, None, PLENTY)],
)
def test_odd_sizes_change_no_bit(
    odd: Model, odd_alone: Run, num_stages: int, max_chunk_tokens: int | None, num_blocks: int
) -> None:
    layers = _cut(14, num_stages)
    run = odd.run(_make_works(odd.config), layers=layers, max_chunk_tokens=max_chunk_tokens, num_blocks=num_blocks)
    assert (run.num_preemptions > 0) == (num_blocks != PLENTY)
    _assert_same(run, odd_alone)


@pytest.mark.parametrize(
    ("num_stages", "max_chunk_tokens", "num_blocks"), [(1, WHOLE, PLENTY), (1, 1, PLENTY), (2, 7, 12), (3, 64, PLENTY)]
)
def test_long_sums_change_no_bit(
    wide: Model, wide_alone: Run, num_stages: int, max_chunk_tokens: int, num_blocks: int
) -> None:
    layers = _cut(3, num_stages)
    run = wide.run(_make_works(WIDE), layers=layers, max_chunk_tokens=max_chunk_tokens, num_blocks=num_blocks)
    _assert_same(run, wide_alone)


@pytest.mark.parametrize("max_chunk_tokens", [1, WHOLE])
def test_a_lone_request_with_long_sums_has_the_same_bits(wide: Model, wide_alone: Run, max_chunk_tokens: int) -> None:
    run = wide.run({0: _make_works(WIDE)[0]}, layers=(2, 1), max_chunk_tokens=max_chunk_tokens)
    _assert_same(run, wide_alone)


def test_a_repeated_run_has_the_same_bits(odd: Model, odd_alone: Run) -> None:
    _assert_same(_alone(odd), odd_alone)


# Weights of few bits: as exact


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_few_bits_are_as_exact(bits: Bits) -> None:
    """Log probabilities follow from the bits of the logits."""
    model = Model("demo", bits)
    works = _make_works(model.config)
    torch.set_num_threads(1)
    lone = {id_: works[id_] for id_ in (0, 1)}
    alone = [model.run({id_: work}) for id_, work in lone.items()]
    expected = Run(
        token_ids={id_: tokens for run in alone for id_, tokens in run.token_ids.items()},
        logits={key: row for run in alone for key, row in run.logits.items()},
        num_preemptions=0,
        most_in_flight=1,
    )
    for num_stages, max_chunk_tokens in ((1, 1), (2, 7), (4, 64), (7, None)):
        run = model.run(lone, layers=_cut(28, num_stages), max_chunk_tokens=max_chunk_tokens)
        _assert_same(run, expected)
    torch.set_num_threads(2)
    in_company = model.run(works, layers=_cut(28, 2), max_chunk_tokens=64)
    for key, row in expected.logits.items():
        assert torch.equal(row, in_company.logits[key])
    assert {id_: in_company.token_ids[id_] for id_ in lone} == expected.token_ids


# What makes the comparisons above worth something


@pytest.mark.parametrize("model_name", ["demo", "odd", "wide"])
def test_the_reference_covers_every_step(model_name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(model_name)
    alone: Run = request.getfixturevalue(f"{model_name}_alone")
    steps = {
        (id_, position)
        for id_, work in _make_works(model.config).items()
        for position in range(len(work.prompt_ids), len(alone.token_ids[id_]))
    }
    assert alone.logits.keys() == steps
    assert all(row.std() > 0.5 and row.isfinite().all() for row in alone.logits.values())
    generated = {
        token
        for id_, work in _make_works(model.config).items()
        for token in alone.token_ids[id_][len(work.prompt_ids) :]
    }
    assert len(generated) > 20
    assert generated.isdisjoint({5, model.config.vocab_size - 1})
