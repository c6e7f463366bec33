"""Finds a better cut for stages whose steps were measured, and waits until it is sure. Stdlib only.

A stage's time goes to its layers alike, and on the last one to `lm_head`, which costs as many layers as its bytes are,
for rows that are sampled. So the measured steps give the time of a layer on each stage, and that of any other cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptj_dist.planning.search import share_layers

SLOWEST_RATIO = 1.15
"""A stage is out of balance if its step takes this many times as long as the mean of the others' steps."""

SETTLING_RATIO = 1.05
"""The same after layers have moved, until the stages were found in balance: part of a step is the same for any number
of layers, so the first cut does not go far enough."""

LEAST_GAIN = 0.05
"""Share of the slowest step that another cut must save. A layer more or less than the best cut saves less."""

FIRST_LOOKS, MOST_LOOKS = 3, 24
"""Looks in a row at which the same stage is the slowest, before its layers move. Doubles with each new cut."""


@dataclass(frozen=True, slots=True)
class BetterCut:
    """A cut that is worth moving layers for.

    Args:
        layers: of each stage.
        slowest: the stage that is slowest now.
        ratio: its step, compared with the mean of the others'.
        gain: share of its step that the slowest stage of the new cut saves.
    """

    layers: tuple[int, ...]
    slowest: int
    ratio: float
    gain: float

    def __str__(self) -> str:
        cut = ",".join(map(str, self.layers))
        return (
            f"stage {self.slowest} takes {self.ratio:.2f} times as long as the others; the cut {cut} makes the slowest "
            f"step {self.gain:.0%} shorter"
        )


def better_cut(
    layers: Sequence[int], step_s: Sequence[float], head_layers: float, least_ratio: float = SLOWEST_RATIO
) -> BetterCut | None:
    """The cut whose slowest stage is fastest; None if the stages are in balance, or it gains too little.

    Args:
        layers: of each stage now.
        step_s: mean time of the same steps on each stage.
        head_layers: what `lm_head` cost in these steps, in layers.
        least_ratio: the stages are in balance if the slowest step is less than so many times the mean of the others.
    """
    slowest = max(range(len(layers)), key=step_s.__getitem__)
    others = [time for stage, time in enumerate(step_s) if stage != slowest]
    if not others or min(step_s) <= 0 or step_s[slowest] < least_ratio * sum(others) / len(others):
        return None
    heads = [0.0] * (len(layers) - 1) + [head_layers]
    layer_s = [time / (count + head) for time, count, head in zip(step_s, layers, heads, strict=True)]
    costs = [
        [each * (count + head) for count in range(1, sum(layers) + 1)]
        for each, head in zip(layer_s, heads, strict=True)
    ]
    cut = share_layers(sum(layers), costs)
    gain = 1 - max(of_stage[count - 1] for of_stage, count in zip(costs, cut, strict=True)) / step_s[slowest]
    if gain < LEAST_GAIN:
        return None
    return BetterCut(cut, slowest, step_s[slowest] * len(others) / sum(others), gain)


class Balance:
    """Decides when layers move. Each new cut doubles the patience, so that layers do not move to and fro.

    Attributes:
        num_looks: looks in a row that found the same stage.
        patience: how many of them the next new cut takes.
        least_ratio: for `better_cut`.
    """

    def __init__(self) -> None:
        self.num_looks = 0
        self.patience = FIRST_LOOKS
        self.least_ratio = SLOWEST_RATIO
        self._slowest: int | None = None

    def note(self, slowest: int | None) -> bool:
        """Takes the stage that a look has found; None if the stages are in balance. Says whether layers are to move."""
        if slowest != self._slowest:
            self._slowest, self.num_looks = slowest, 0
        self.num_looks += 1
        if slowest is None and self.num_looks >= FIRST_LOOKS:
            self.least_ratio = SLOWEST_RATIO
        return slowest is not None and self.num_looks >= self.patience

    def note_new_cut(self) -> None:
        """Layers move now."""
        self.patience = min(2 * self.patience, MOST_LOOKS)
        self.least_ratio = SETTLING_RATIO
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets the looks in a row: the cut is another one."""
        self._slowest, self.num_looks = None, 0
