"""Records when each stage computed each plan, and sums up how busy the stages are and what they wait for.

Timings arrive with results: of a plan in flight, only the time of its submission is known. So each stage is summed up
over the last seconds in which all of its work is known. They end now if nothing is in flight, and otherwise at the end
of the stage's step for the newest plan that came back. Times of different machines are as exact as their clocks agree.
A stage's own shares and steps use one clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median

from gptj_dist.engine.histogram import Histogram
from gptj_dist.engine.plan import Plan, Result, StageTiming

WINDOW_S = 10.0
MAX_RECORDS = 4096
"""Plans that are kept: some megabytes, and enough for a fast pipeline between two reads of a trace."""

NUM_PACE_RECORDS = 64

_Interval = tuple[int, int]
"""Begin and end in nanoseconds."""


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A completed plan: what it computed, and when. Times are nanoseconds of a `SteadyClock`.

    Args:
        number: counts the pipeline's plans from 0. Unlike `plan_id` it does not restart when stages are replaced.
        num_decodes: requests with one token in the plan, beside drafts.
        num_prefill_tokens: tokens in chunks of more than one token.
        num_drafts: of all requests.
        num_context_tokens: tokens that attention reads: for each request, all up to its last one in the plan.
        num_sampled_tokens: tokens that the plan sampled.
        scheduling: from the start of the scheduling until the plan was submitted.
        landing: from the result's arrival until its tokens were in their streams.
        timings: one for each stage, first to last.
    """

    number: int
    plan_id: int
    num_decodes: int
    num_prefill_tokens: int
    num_drafts: int
    num_context_tokens: int
    num_sampled_tokens: int
    scheduling: StageTiming
    landing: StageTiming
    timings: tuple[StageTiming, ...]


@dataclass(frozen=True, slots=True)
class StageSnapshot:
    """A stage in the last seconds. All are None before the first plan has come back.

    Args:
        busy_share: share of the time in which it computed, from 0 to 1.
        bubble_share: share of the time in which it did not compute although plans were in flight, from 0 to 1.
        step_ms: median time of a step; None if there was none.
        queue: mean number of plans that waited for it; transport counts as waiting.
        wait_ms: mean time that a plan waited for it; None if there was none.
    """

    busy_share: float | None = None
    bubble_share: float | None = None
    step_ms: float | None = None
    queue: float | None = None
    wait_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pipeline in the last seconds.

    Args:
        window_s: the number of these seconds.
        prompt_tokens_per_s: prompt tokens computed; those computed again after a preemption count again.
        coordinator_share: share of the time in which the coordinator scheduled plans or took in results.
        stages: first to last; empty before the first plan has come back.
    """

    window_s: float
    plans_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    coordinator_share: float
    stages: tuple[StageSnapshot, ...]


@dataclass(slots=True)
class StageWork:
    """The work of a stage since the first plan.

    Attributes:
        step_time: times of its steps; their sum is the time in which it computed.
        bubble_ns: time in which it did not compute although plans were in flight.
    """

    step_time: Histogram = field(default_factory=Histogram)
    bubble_ns: int = 0


class PipelineStats:
    """Statistics of one pipeline. The coordinator notes every plan, in order.

    Args:
        clock: nanoseconds; a `SteadyClock` if the readings are compared with those of stages.
        window_s: seconds that a snapshot covers.
        max_records: the most plans that are kept; a snapshot of a faster pipeline covers less time.

    Attributes:
        stages: first to last; empty before the first plan has come back.
        num_plans: plans that came back.
        coordinator_ns: time in which the coordinator scheduled plans and took in results.
        num_drafts, num_accepted: drafts in the plans that came back, and those of them that were accepted.
    """

    def __init__(self, clock: Callable[[], int], window_s: float = WINDOW_S, max_records: int = MAX_RECORDS) -> None:
        self.now_ns = clock
        self._window_ns = round(window_s * 1e9)
        self._records: deque[PlanRecord] = deque(maxlen=max_records)
        self._flights: deque[tuple[Plan, StageTiming]] = deque()
        self.num_plans = 0
        self._complete_since_ns = clock()
        self._before: PlanRecord | None = None
        self.stages: tuple[StageWork, ...] = ()
        self.coordinator_ns = 0
        self.num_drafts = self.num_accepted = 0

    def note_submitted(self, plan: Plan, begin_ns: int) -> int:
        """The plan was submitted; its scheduling began at `begin_ns`. Returns the time now."""
        scheduling = StageTiming(begin_ns, self.now_ns())
        self._flights.append((plan, scheduling))
        return scheduling.end_ns

    def note_landed(self, result: Result, begin_ns: int) -> None:
        """The oldest plan in flight came back at `begin_ns`, and its tokens are in their streams."""
        plan, scheduling = self._flights.popleft()
        if len(self._records) == self._records.maxlen:
            self._complete_since_ns = self._records[0].landing.begin_ns
        lengths = [chunk.num_known for chunk in plan.chunks]
        num_decodes, num_known = lengths.count(1), sum(lengths)
        record = PlanRecord(
            number=self.num_plans,
            plan_id=plan.plan_id,
            num_decodes=num_decodes,
            num_prefill_tokens=num_known - num_decodes,
            num_drafts=plan.num_tokens - num_known,
            num_context_tokens=plan.num_tokens + sum(chunk.start for chunk in plan.chunks),
            num_sampled_tokens=len(result.token_ids),
            scheduling=scheduling,
            landing=StageTiming(begin_ns, self.now_ns()),
            timings=result.timings,
        )
        self._records.append(record)
        self.num_plans += 1
        self.num_drafts += record.num_drafts
        self.num_accepted += sum(result.num_accepted)
        self._add_up(record)

    def note_lost(self) -> None:
        """The stages died; the plans in flight are lost."""
        self._flights.clear()
        self._before = None

    def records(self, since: int = 0) -> tuple[PlanRecord, ...]:
        """The plans from number `since` on that came back and are still kept, oldest first."""
        num_forgotten = self.num_plans - len(self._records)
        return tuple(islice(self._records, max(0, since - num_forgotten), None))

    def token_s(self) -> float:
        """Median of the seconds that the last plans without prompt tokens took, from which requests wait for a token.

        0 if there were none.
        """
        last = (record for record in reversed(self._records) if not record.num_prefill_tokens)
        took = [record.landing.end_ns - record.scheduling.begin_ns for record in islice(last, NUM_PACE_RECORDS)]
        return median(took) / 1e9 if took else 0.0

    def snapshot(self) -> Snapshot:
        """Sums up the last seconds."""
        now_ns = self.now_ns()
        begin_ns = max(now_ns - self._window_ns, self._complete_since_ns)
        window_s = max(now_ns - begin_ns, 1) / 1e9
        landed = [record for record in self._records if record.landing.end_ns > begin_ns]
        coordinating = [interval for record in landed for interval in (record.scheduling, record.landing)]
        return Snapshot(
            window_s=window_s,
            plans_per_s=len(landed) / window_s,
            prompt_tokens_per_s=sum(record.num_prefill_tokens for record in landed) / window_s,
            output_tokens_per_s=sum(record.num_sampled_tokens for record in landed) / window_s,
            coordinator_share=_covered_ns(coordinating, begin_ns, now_ns) / 1e9 / window_s,
            stages=self._stages(now_ns),
        )

    def _add_up(self, record: PlanRecord) -> None:
        """A stage's bubble is the gap between its steps, less the time in which nothing was in flight."""
        self.coordinator_ns += sum(end - begin for begin, end in (record.scheduling, record.landing))
        self.stages = self.stages or tuple(StageWork() for _ in record.timings)
        before, self._before = self._before, record
        empty_ns = max(0, record.scheduling.end_ns - before.landing.begin_ns) if before else 0
        for stage, work in enumerate(self.stages):
            begin_ns, end_ns = record.timings[stage]
            work.step_time.observe(end_ns - begin_ns)
            if before is not None:
                work.bubble_ns += max(0, begin_ns - before.timings[stage].end_ns - empty_ns)

    def _stages(self, now_ns: int) -> tuple[StageSnapshot, ...]:
        if not self._records:
            return ()
        known_until = [self._known_until_ns(index, now_ns) for index in range(len(self._records[-1].timings))]
        horizon_ns = min(known_until, default=now_ns) - self._window_ns
        records = [record for record in self._records if record.landing.begin_ns > horizon_ns]
        flown = [(record.scheduling.end_ns, record.landing.begin_ns) for record in records]
        in_flight = _union([*flown, *((scheduling.end_ns, now_ns) for _, scheduling in self._flights)])
        return tuple(self._stage(index, end_ns, records, in_flight) for index, end_ns in enumerate(known_until))

    def _known_until_ns(self, index: int, now_ns: int) -> int:
        """Time up to which the stage's activity is known: timings of plans in flight have not arrived yet."""
        if not self._flights:
            return now_ns
        ended_ns = self._records[-1].timings[index].end_ns
        return min(now_ns, max(ended_ns, self._flights[0][1].end_ns))

    def _stage(
        self, index: int, end_ns: int, records: Sequence[PlanRecord], in_flight: Sequence[_Interval]
    ) -> StageSnapshot:
        begin_ns = max(end_ns - self._window_ns, self._complete_since_ns)
        window_ns = max(end_ns - begin_ns, 1)
        steps = [record.timings[index] for record in records]
        left_ns = [(record.timings[index - 1] if index else record.scheduling).end_ns for record in records]
        waits = [(left, max(left, step.begin_ns)) for left, step in zip(left_ns, steps, strict=True)]
        within = [number for number, step in enumerate(steps) if begin_ns < step.end_ns <= end_ns]
        busy_ns = _covered_ns(steps, begin_ns, end_ns)
        return StageSnapshot(
            busy_share=busy_ns / window_ns,
            bubble_share=max(0, _covered_ns(in_flight, begin_ns, end_ns) - busy_ns) / window_ns,
            step_ms=median(steps[n].end_ns - steps[n].begin_ns for n in within) / 1e6 if within else None,
            queue=_covered_ns(waits, begin_ns, end_ns) / window_ns,
            wait_ms=sum(waits[n][1] - waits[n][0] for n in within) / len(within) / 1e6 if within else None,
        )


def _covered_ns(intervals: Iterable[_Interval], begin_ns: int, end_ns: int) -> int:
    """Nanoseconds of [begin, end) that the intervals cover; where they overlap, each counts."""
    return sum(min(end, end_ns) - max(begin, begin_ns) for begin, end in intervals if begin < end_ns and end > begin_ns)


def _union(intervals: Iterable[_Interval]) -> list[_Interval]:
    """The times that at least one interval covers.

    Args:
        intervals: in order of their begins.
    """
    union: list[_Interval] = []
    for begin, end in intervals:
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((begin, end))
    return union
