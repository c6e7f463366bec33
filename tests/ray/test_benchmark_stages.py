"""The offline benchmark measures stages that are actors, each for itself, and leaves no process behind."""

from __future__ import annotations

import pytest

from benchmarks.cases import Case
from benchmarks.contenders import EngineContender
from benchmarks.worker_process import WorkerProcess
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


def test_stages_of_a_pipeline_are_measured_each_for_itself() -> None:
    worker = WorkerProcess("ours", {"model": "demo", "stages": 2, "dtype": "float32"})
    figures = EngineContender(worker).measure(Case(2, 8, 4), seed=1)
    assert {"stage_0_cores", "stage_1_cores", "decode_tokens_per_s"} <= figures.keys()
    assert len(worker.about["layers"]) == 2
    worker.close()
    wait_until(lambda: worker.family.members() == [], "no process is left")
