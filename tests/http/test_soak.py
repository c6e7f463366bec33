"""Load while stages and the coordinator are killed: nothing is lost, wrong or left."""

from __future__ import annotations

import pytest

from benchmarks.soak import soaked

pytestmark = pytest.mark.ray


def test_nothing_is_lost_wrong_or_left_while_processes_are_killed() -> None:
    document = soaked(load_s=24.0, stage_every_s=8.0, coordinator_every_s=17.0)
    assert document["problems"] == []
    assert document["num_used_blocks"] == 0
    assert "coordinator" in document["kills"]
    assert any(role.startswith("stage") for role in document["kills"])
    assert min(document["ends"][end] for end in ("completed", "disconnected", "refused")) > 0
