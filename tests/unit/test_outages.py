"""What is told of an outage: what is down, why, since when, and how long the recovery took."""

from __future__ import annotations

from dataclasses import replace

from gptj_dist.errors import StageFailedError
from gptj_dist.serving.outages import Outages
from gptj_dist.stages.loss import StageLoss
from gptj_dist.stages.transport.frames import FrameFault, FrameFaultError

LOSS = StageLoss(1, "exited with code 3", "alpha", 12, "step begins")


def outages_at(now_s: list[float]) -> Outages:
    return Outages(4.0, lambda: now_s[0])


def told(outages: Outages) -> tuple[str | None, float | None]:
    return outages.problem, outages.down_s


def test_a_lost_stage_is_told_at_once_and_its_cause_as_soon_as_it_is_known() -> None:
    now_s = [100.0]
    outages = outages_at(now_s)
    assert told(outages) == (None, None)
    outages.begin(StageFailedError("stage 1 died"))
    now_s[0] += 1.25
    assert told(outages) == ("stage 1 died", 1.25)
    outages.note_losses([LOSS])
    assert outages.problem == "stage 1 (pid 12 on alpha) exited with code 3; its last log line: step begins"
    known = f"(down for 1.2 s: {outages.problem})"
    assert outages.message == f"the pipeline has lost a stage and replaces it; requests wait until it is back {known}"
    now_s[0] += 1.25
    assert outages.back_in_s == 1.5
    assert outages.end() == 2.5
    assert outages.back_in_s == 0
    assert told(outages) == (None, None)
    (loss,) = outages.losses
    assert loss == replace(LOSS, back_after_s=2.5, lost_at=loss.lost_at)
    assert (sum(outages.recovery_time.counts), outages.recovery_time.sum_ns) == (1, 2_500_000_000)


def test_a_cause_that_becomes_known_after_the_return_is_of_the_last_outage() -> None:
    outages = outages_at([0.0])
    outages.begin(StageFailedError("stage 1 died"))
    outages.end()
    outages.note_losses([LOSS])
    (loss,) = outages.losses
    assert loss.back_after_s == 0
    outages.begin(StageFailedError("stage 0 died"))
    assert outages.problem == "stage 0 died"


def test_a_lost_frame_is_no_lost_stage() -> None:
    outages = outages_at([0.0])
    error = StageFailedError("on the edge 0->1 a frame is missing: all stages wait for one")
    error.__cause__ = FrameFaultError(FrameFault.MISSING, "all stages wait for one")
    outages.begin(error)
    assert outages.message.startswith("the pipeline has lost a frame and joins its stages anew; ")
    assert "0->1" in outages.message
