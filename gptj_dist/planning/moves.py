"""The moves of layers between neighbours that lead from one cut to another. Stdlib only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptj_dist.config import LayerRange


@dataclass(frozen=True, slots=True)
class LayerMove:
    """The move of a layer between two neighbours.

    Args:
        layer: its number in the model.
        giver, receiver: stages.
        before, after: the layers of all stages.
    """

    layer: int
    giver: int
    receiver: int
    before: tuple[LayerRange, ...]
    after: tuple[LayerRange, ...]

    def __str__(self) -> str:
        return f"layer {self.layer} from stage {self.giver} to stage {self.receiver}"


def layer_moves(before: Sequence[LayerRange], after: Sequence[LayerRange]) -> list[LayerMove]:
    """The moves, one layer at a time, that lead from one cut to another. Every stage always has a layer.

    Raises:
        ValueError: the cuts have unlike numbers of stages or layers.
    """
    if len(before) != len(after) or before[-1].stop != after[-1].stop:
        raise ValueError(f"{before[-1].stop} layers on {len(before)} stages cannot become another number of either")
    stops, wanted = [layers.stop for layers in before], [layers.stop for layers in after]
    moves: list[LayerMove] = []
    present = tuple(before)
    while stops != wanted:
        edge = next(edge for edge in range(len(stops) - 1) if _can_shift(stops, wanted, edge))
        if wanted[edge] > stops[edge]:
            layer, giver, receiver = stops[edge], edge + 1, edge
            stops[edge] += 1
        else:
            layer, giver, receiver = stops[edge] - 1, edge, edge + 1
            stops[edge] -= 1
        shifted = _ranges(stops)
        moves.append(LayerMove(layer, giver, receiver, present, shifted))
        present = shifted
    return moves


def _can_shift(stops: Sequence[int], wanted: Sequence[int], edge: int) -> bool:
    """Whether the edge has to shift by a layer, and leaves one to the stage that gives.

    One such edge exists: where the giver has only one layer, its other edge has to shift the same way.
    """
    if wanted[edge] > stops[edge]:
        return stops[edge] + 1 < stops[edge + 1]
    return wanted[edge] < stops[edge] and stops[edge] - 1 > (stops[edge - 1] if edge else 0)


def _ranges(stops: Sequence[int]) -> tuple[LayerRange, ...]:
    starts = [0, *stops[:-1]]
    return tuple(
        LayerRange(i, len(stops), start, stop) for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )
