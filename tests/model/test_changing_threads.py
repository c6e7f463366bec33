"""The number of threads may change at any layer: no bit of float32 logits depends on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptj_dist.config import PipelineConfig
from gptj_dist.engine.plan import Chunk, NewRequest, Plan
from gptj_dist.params import SamplingParams
from gptj_dist.stages import lone_steps
from gptj_dist.stages import runner as runner_module
from gptj_dist.stages.local import load_local
from gptj_dist.stages.runner import default_threads
from gptj_dist.stages.threads import ThreadChooser

pytestmark = pytest.mark.usefixtures("restored_threads")

PROMPT = tuple(range(5, 45))


class RestlessChooser(ThreadChooser):
    """Computes each layer with another number of threads than the one before."""

    counts = (3, 1, 2, 5)

    def begin_step(self) -> None:
        torch.set_num_threads(4)

    def end_layer(self, layer: int) -> None:
        torch.set_num_threads(self.counts[layer % 4])


def logits_of_a_prompt_and_eight_tokens(threads: int | None) -> Tensor:
    """[9, vocab_size], of the demo model."""
    config = PipelineConfig("demo", dtype="float32", kv_cache_gb=0.02, threads_per_stage=threads)
    _, (runner,) = load_local(config)
    request = NewRequest(0, SamplingParams(temperature=0), 0, len(PROMPT))
    plans = [Plan(0, (), (request,), (Chunk(0, 0, PROMPT, (3, 1, 2), True),))]
    plans += [Plan(1 + i, (), (), (Chunk(0, 40 + i, (7 * i,), (0,) if i == 8 else (), True),)) for i in range(8)]
    return torch.cat([runner.forward(plan, None) for plan in plans])


def test_no_bit_depends_on_the_number_of_threads_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits_of_a_prompt_and_eight_tokens(threads=1)
    monkeypatch.setattr(lone_steps, "ThreadChooser", RestlessChooser)
    assert torch.equal(logits_of_a_prompt_and_eight_tokens(threads=5), expected)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (64, 5)])
def test_threads_are_at_most_the_cores_available(monkeypatch: pytest.MonkeyPatch, cores: int, expected: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner_module, "available_cores", lambda: cores)
    torch.set_num_threads(5)
    assert default_threads() == expected


def test_a_number_of_threads_in_the_environment_holds_whatever_cores_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(runner_module, "available_cores", lambda: 1)
    torch.set_num_threads(5)  # as torch does when it is imported
    assert default_threads() == 5


def test_a_stage_tells_its_chooser_of_every_layer_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Recorder(ThreadChooser):
        def begin_step(self) -> None:
            calls.append(-1)

        def end_layer(self, layer: int) -> None:
            calls.append(layer)

    monkeypatch.setattr(lone_steps, "ThreadChooser", Recorder)
    logits_of_a_prompt_and_eight_tokens(threads=None)
    assert calls == list(range(-1, 28)) * 9
