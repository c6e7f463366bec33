"""Arithmetic of measurements, tables, and the JSON document that a benchmark prints. Imports neither torch nor Ray."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptj_dist.stages.cores import available_cores

Figures = Mapping[str, float]
"""Figures by name. Names of times end in their unit, such as `_ms`; of all other figures, larger is better."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolates linearly between the two nearest values, like numpy's default."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarise(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile in ms, named as in vLLM's serving benchmark; empty without values."""
    if not seconds:
        return {}
    return {
        f"mean_{name}_ms": 1000 * statistics.fmean(seconds),
        f"median_{name}_ms": 1000 * statistics.median(seconds),
        f"p99_{name}_ms": 1000 * percentile(seconds, 99),
    }


def medians(runs: Sequence[Figures]) -> dict[str, float]:
    """The median of each figure that every run has."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0] if all(name in run for run in runs)}


def times_as_good(name: str, one: float, other: float) -> float:
    """The ratio of two figures, above 1 if `one` is better: `one / other` for rates, `other / one` for times."""
    return other / one if name.endswith(("_ms", "_us")) else one / other


def rounded(value: Any) -> Any:
    """Rounds all floats of a document to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def machine() -> dict[str, Any]:
    """Description of this machine for a document."""
    lines = _cpuinfo()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.machine(),
        "num_cores": available_cores(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def print_document(benchmark: str, fields: Mapping[str, Any]) -> None:
    """Prints a benchmark's result as one JSON line, the last on standard output."""
    print(json.dumps(rounded({"benchmark": benchmark, **fields})), flush=True)


def print_row(cells: Iterable[object]) -> None:
    """Prints a line of a table: a name, then columns of figures."""
    name, *columns = cells
    texts = (f"{cell:>20.4g}" if isinstance(cell, float) else f"{cell!s:>20}" for cell in columns)
    print(f"{name!s:<36}{''.join(texts)}", flush=True)


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return file.read().splitlines()
    except OSError:
        return []
