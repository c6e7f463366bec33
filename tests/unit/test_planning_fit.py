"""Figures found from timed steps: those that made the times."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.operate.calibration import CALIBRATION_SHAPES, CASES
from gptj_dist.planning.cost import Work, step_s, step_work
from gptj_dist.planning.devices import known_device
from gptj_dist.planning.fit import fit_device

TRUE = replace(
    known_device("cpu"),
    bandwidth_bytes_s=37e9,
    kv_bandwidth_bytes_s=11e9,
    flops=613e9,
    attention_flops=129e9,
    row_elements_s=61e6,
    step_overhead_s=200e-6,
    layer_overhead_s=120e-6,
)
DEEP = ModelConfig(50400, 28, 1024, 16, 32, 4096, 2048, (50256,), "bfloat16")


def timed(model: ModelConfig) -> list[tuple[Work, float]]:
    whole = LayerRange.whole(model.num_layers)
    works = [step_work(model, whole, "bfloat16", "cpu", [case]) for case in CASES]
    return [(work, step_s(TRUE, "bfloat16", work)) for work in works]


def test_the_steps_of_a_model_are_predicted_from_those_of_others() -> None:
    fitted = fit_device(known_device("cpu"), [step for shape in CALIBRATION_SHAPES for step in timed(shape)])
    for work, seconds in timed(DEEP):
        assert step_s(fitted, "bfloat16", work) == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_a_few_disturbed_steps_do_little(seed: int) -> None:
    rng = random.Random(seed)
    steps = [
        (work, seconds * rng.uniform(0.95, 1.05)) for shape in CALIBRATION_SHAPES for work, seconds in timed(shape)
    ]
    for index in rng.sample(range(len(steps)), 3):
        steps[index] = (steps[index][0], steps[index][1] * 3)
    fitted = fit_device(known_device("cpu"), steps)
    for work, seconds in timed(DEEP):
        assert step_s(fitted, "bfloat16", work) == pytest.approx(seconds, rel=0.25)


def test_no_figure_is_negative() -> None:
    nonsense = [(work, 1.0) for shape in CALIBRATION_SHAPES for work, _ in timed(shape)]
    fitted = fit_device(known_device("cpu"), nonsense)
    assert fitted.step_overhead_s >= 0
    assert fitted.layer_overhead_s >= 0
    assert fitted.bandwidth_bytes_s > 0
