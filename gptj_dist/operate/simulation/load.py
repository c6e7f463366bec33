"""Requests of clients: how long they are, and when they come."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of prompts and outputs, in tokens.

    Args:
        prompt_tokens, output_tokens: means.
        spread: standard deviation of the lengths' logarithms; 0 makes all equal. 0.8 is usual for people's requests.
        most_tokens: the most that a prompt and its output have together.
    """

    prompt_tokens: float
    output_tokens: float
    spread: float = 0.0
    most_tokens: int = 2048

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """A prompt's length and its output's, each 1 or more."""
        half = self.most_tokens // 2
        prompt, output = (self._draw(rng, mean) for mean in (self.prompt_tokens, self.output_tokens))
        output = min(output, max(half, self.most_tokens - prompt))
        return min(prompt, self.most_tokens - output), output

    def _draw(self, rng: random.Random, mean: float) -> int:
        if not self.spread:
            return max(1, min(round(mean), self.most_tokens - 1))
        drawn = rng.lognormvariate(math.log(mean) - self.spread**2 / 2, self.spread)
        return max(1, min(round(drawn), self.most_tokens - 1))


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Clients that each send the next request when their last one has ended.

    Args:
        num_streams: clients.
        num_requests: of all clients together.
    """

    num_streams: int
    num_requests: int
    lengths: Lengths
    seed: int = 0


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests that come at random times (a Poisson process), whatever becomes of earlier ones.

    Args:
        rate: requests a second.
    """

    rate: float
    num_requests: int
    lengths: Lengths
    seed: int = 0

    def arrivals(self) -> list[float]:
        """The time of each request, in seconds, in order; the first is 0. `benchmarks.load` sends at the same times."""
        rng = random.Random(self.seed)  # nosec B311  # keeps no secret
        times, now_s = [], 0.0
        for _ in range(self.num_requests):
            times.append(now_s)
            now_s += rng.expovariate(self.rate)
        return times


Load = ClosedLoop | OpenLoop


def lengths_of(load: Load) -> list[tuple[int, int]]:
    """The lengths of all requests of a load."""
    rng = random.Random(f"lengths {load.seed}")  # nosec B311  # keeps no secret
    return [load.lengths.draw(rng) for _ in range(load.num_requests)]
