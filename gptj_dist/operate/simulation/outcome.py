"""What came of a simulated load: rates, times, how busy everything was, and what limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_GROWTH = 1.6
"""First tokens of the last quarter of the requests may take this many times as long as those of the second one. Where
requests come faster than they end, it is 2.3: the wait grows with time."""

FULL_SHARE = 0.9
"""What is busy for a larger share of the time than this limits the throughput."""


@dataclass(slots=True)
class Trip:
    """A request's times, in seconds.

    Args:
        num_tokens: of its output.
    """

    came_s: float
    num_tokens: int
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def first_token_s(self) -> float:
        return self.first_s - self.came_s

    @property
    def token_s(self) -> float:
        """From token to token, on average; 0 if there is only one."""
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a load.

    Args:
        tokens_per_s: output tokens of all requests, from the first request to the last token; of an open loop, of those
            that came in its middle.
        first_token_s, token_s: percentiles 50 and 99 over requests.
        busy: shares of the time for which stages, links, coordinators and ingresses were busy: of the busiest of each
            kind. Of an open loop, only the time in which requests came counts.
        mean_requests: in the server at once.
        growth: median of the seconds to the first token in the last quarter of the requests, over the second quarter.
    """

    tokens_per_s: float
    first_token_s: tuple[float, float]
    token_s: tuple[float, float]
    busy: Mapping[str, float]
    mean_requests: float
    growth: float

    @property
    def keeps_up(self) -> bool:
        """Whether requests end as fast as they come, so that no queue grows. Of an open loop only."""
        return self.growth < MOST_GROWTH

    @property
    def limit(self) -> str:
        """What limits the throughput: the busiest kind, or `requests` if nothing is full: more of them would add."""
        name, share = max(self.busy.items(), key=lambda item: item[1])
        return name if share > FULL_SHARE else "requests"


def summed_up(trips: Sequence[Trip], busy: Mapping[str, float], begin_s: float, end_s: float) -> Outcome:
    """The outcome of requests of which all tokens have come.

    Args:
        begin_s, end_s: of the time that counts for rates.
    """
    seconds = end_s - begin_s
    tokens = sum(_tokens_within(trip, begin_s, end_s) for trip in trips)
    stay_s = sum(max(0.0, min(trip.last_s, end_s) - max(trip.came_s, begin_s)) for trip in trips)
    later = [trip.token_s for trip in trips if trip.num_tokens > 1] or [0.0]
    firsts = [trip.first_token_s for trip in trips]
    return Outcome(
        tokens / seconds,
        (percentile(firsts, 50), percentile(firsts, 99)),
        (percentile(later, 50), percentile(later, 99)),
        dict(busy),
        stay_s / seconds,
        _growth(firsts),
    )


def _growth(firsts: Sequence[float]) -> float:
    quarter = len(firsts) // 4
    if not quarter:
        return 1.0
    return percentile(firsts[-quarter:], 50) / percentile(firsts[quarter : 2 * quarter], 50)


def _tokens_within(trip: Trip, begin_s: float, end_s: float) -> float:
    """Tokens of a request in a time: the first when it came, the others evenly until the last."""
    first = 1.0 if begin_s <= trip.first_s <= end_s else 0.0
    if trip.last_s <= trip.first_s:
        return trip.num_tokens if first else 0.0
    within_s = max(0.0, min(trip.last_s, end_s) - max(trip.first_s, begin_s))
    return first + (trip.num_tokens - 1) * within_s / (trip.last_s - trip.first_s)


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the nearest values in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
