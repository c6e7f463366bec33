"""Finds the figures of a device from measured steps: non-negative least squares over the terms of `planning.cost`.

The formula is linear in the inverses of a CPU's figures, so each measured step is one linear equation. The fit
minimises the relative error, so that steps of half a millisecond count as much as steps of seconds. A step that another
process disturbed counts less the further it is off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, replace

from gptj_dist.planning.cost import Work
from gptj_dist.planning.devices import DeviceSpec

_NUM_REWEIGHTINGS = 4
_USUAL_ERROR = 0.05
"""Relative error up to which steps count about alike."""

_NUM_SWEEPS = 3000


def fit_device(device: DeviceSpec, measured: Sequence[tuple[Work, float]]) -> DeviceSpec:
    """The device with the figures that explain measured steps best.

    Args:
        device: provides the figures that are not fitted, such as name, memory and link; its kind must be `cpu`.
        measured: the work of each step, all of one type, and the seconds that it took.
    """
    rows = [[term / seconds for term in (1.0, *astuple(work))] for work, seconds in measured]
    weights = [1.0] * len(rows)
    for _ in range(_NUM_REWEIGHTINGS):
        costs = _least_squares(rows, weights)
        errors = [abs(sum(c * x for c, x in zip(costs, row, strict=True)) - 1) for row in rows]
        weights = [1 / (error + _USUAL_ERROR) for error in errors]
    # The cost of a step, and of a unit of each of the work's terms, in the order of its fields.
    step, layer, weight_byte, kv_byte, matrix_flop, attention_flop, row_element = costs
    return replace(
        device,
        step_overhead_s=step,
        layer_overhead_s=layer,
        bandwidth_bytes_s=_rate(weight_byte),
        kv_bandwidth_bytes_s=_rate(kv_byte),
        flops=_rate(matrix_flop),
        float32_flops=_rate(matrix_flop),
        attention_flops=_rate(attention_flop),
        row_elements_s=_rate(row_element),
    )


def _rate(cost: float) -> float:
    return 1 / cost if cost > 0 else math.inf


def _least_squares(rows: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The x >= 0 with the least weighted sum of (row . x - 1)**2: coordinate descent on the normal equations.

    Columns are scaled to length 1 first, as their units differ by many powers of ten.
    """
    columns = list(zip(*rows, strict=True))
    scales = [math.sqrt(_dot(column, column, weights)) or 1.0 for column in columns]
    scaled = [[value / scale for value in column] for column, scale in zip(columns, scales, strict=True)]
    gram = [[_dot(a, b, weights) for b in scaled] for a in scaled]
    target = [_dot(column, [1.0] * len(rows), weights) for column in scaled]
    x = [0.0] * len(columns)
    for _ in range(_NUM_SWEEPS):
        for i, row in enumerate(gram):
            if row[i]:
                x[i] = max(0.0, x[i] + (target[i] - sum(g * v for g, v in zip(row, x, strict=True))) / row[i])
    return [value / scale for value, scale in zip(x, scales, strict=True)]


def _dot(a: Sequence[float], b: Sequence[float], weights: Sequence[float]) -> float:
    return sum(u * v * w for u, v, w in zip(a, b, weights, strict=True))
