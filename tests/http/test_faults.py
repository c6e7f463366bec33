"""Streams of every kind are the same bytes when stages die, at several moments, and when Serve's controller does."""

from __future__ import annotations

import pytest

from benchmarks import parts
from benchmarks.faults import MIXED, NUM_STREAMS, Fault, measured

pytestmark = pytest.mark.ray


def test_streams_of_every_kind_have_the_same_bytes_whichever_stage_dies() -> None:
    document = measured(
        [Fault(0, "prefill"), Fault(1, "first"), Fault(2, "middle")], [MIXED], {"dtype": "float32", "quantize": "int4"}
    )
    assert (document["num_kills"], document["num_streams"]) == (3, 3 * NUM_STREAMS)
    assert [(case["errors"], case["different"]) for case in document["cases"]] == [([], {})] * 3


def test_a_stream_goes_on_when_serves_controller_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "AFTERMATH_S", 0.0)
    loss = parts.loss_of("controller")
    assert (loss["stream"], loss["exit_status"]) == ("identical", None)
    assert loss["served_after_s"] is not None
