"""Draws the parts of `benchmarks.simulation` as SVG.

Lines are named at their ends. The ground is white in any theme of the page around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import STYLE

Rows = Sequence[dict[str, Any]]
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b07d1a")
LIMITS = {
    "requests": "#d9d9d9",
    "stages": "#1b6ca8",
    "links": "#7b4b94",
    "coordinator": "#c8553d",
    "ingress": "#b07d1a",
}
LIMIT_TEXTS = {"requests": "too few\nstreams", "coordinator": "coordi-\nnator"}
NAME_POINTS = 11.0
"""From one name of a line to the next, in points."""


def draw_stages(rows: Rows, directory: Path) -> Path:
    """Tokens per second over stages, and what limits each case."""
    figure, (rates, limits) = _figure(2, (10.0, 4.4))
    streams = sorted({row["streams"] for row in rows}, reverse=True)
    stages = sorted({row["stages"] for row in rows})
    _lines(
        rates,
        rows,
        "streams",
        streams,
        "stages",
        lambda row: row["tokens_per_s"],
        lambda n: f"{n} stream{'s' * (n > 1)}",
    )
    rates.set_title("More stages need more streams", loc="left")
    _log_axes(rates, stages, "stages (devices)", "output tokens/s")
    for x, num_stages in enumerate(stages):
        for y, number in enumerate(reversed(streams)):
            [limit] = {row["limit"] for row in rows if (row["stages"], row["streams"]) == (num_stages, number)}
            limits.add_patch(mpl.patches.Rectangle((x, y), 0.96, 0.94, color=LIMITS[limit]))
            colour = "#333333" if limit == "requests" else "white"
            text = LIMIT_TEXTS.get(limit, limit)
            limits.text(x + 0.48, y + 0.47, text, ha="center", va="center", color=colour, fontsize=7)
    limits.set_xlim(0, len(stages))
    limits.set_ylim(0, len(streams))
    limits.set_xticks([x + 0.48 for x in range(len(stages))], list(map(str, stages)))
    limits.set_yticks([y + 0.47 for y in range(len(streams))], list(map(str, reversed(streams))))
    limits.set_xlabel("stages (devices)")
    limits.set_ylabel("streams")
    limits.set_title("What limits: the part that is busy all the time", loc="left")
    limits.grid(visible=False)
    _name_lines(figure, rates)
    return _saved(figure, directory, "simulation-stages")


SHARES: dict[str, tuple[str, str, str]] = {
    "links": ("latency_ms", "latency of each link, ms", "What slow links cost four stages"),
    "slow": ("times_slower", "time of one stage's step, over that of the others", "What one slow stage of four costs"),
}


def draw_shares(rows: Rows, directory: Path, part: str) -> Path:
    """Tokens per second as a share of those of the first case, over what gets worse."""
    key, label, title = SHARES[part]
    figure, (axes,) = _figure(1, (6.4, 4.0))
    streams = sorted({row["streams"] for row in rows})
    best = {number: max(row["tokens_per_s"] for row in rows if row["streams"] == number) for number in streams}

    def share(row: dict[str, Any]) -> float:
        return 100 * float(row["tokens_per_s"] / best[row["streams"]])

    _lines(axes, rows, "streams", streams, key, share, lambda n: f"{n} stream{'s' * (n > 1)}")
    axes.set_ylim(0, 105)
    axes.set_xlabel(label)
    axes.set_ylabel("tokens/s, % of the best")
    axes.set_title(title, loc="left")
    ticks = sorted({row[key] for row in rows})
    if part == "links":
        axes.set_xscale("log")
        axes.set_xlim(ticks[0] * 0.85, ticks[-1] * 1.1)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    _name_lines(figure, axes)
    return _saved(figure, directory, f"simulation-{part}")


def draw_split(rows: Rows, directory: Path) -> Path:
    """First token and time per token over the rate, for each way to use eight devices."""
    figure, both = _figure(2, (10.0, 4.0))
    good = [row for row in rows if row["keeps_up"]]
    stages = sorted({row["stages"] for row in good})
    titles = ("First token, 99 %", "Each later token, 99 %")
    for axes, key, title in zip(both, ("first_token_s", "token_s"), titles, strict=True):

        def value(row: dict[str, Any], key: str = key) -> float:
            return 1e3 * float(row[key][1])

        _lines(axes, good, "stages", stages, "rate", value, lambda n: f"{8 // n} x {n} stage{'s' * (n > 1)}")
        axes.set_title(title, loc="left")
        axes.set_xlabel("requests/s (512 tokens in, 128 out)")
        axes.set_ylabel("ms")
        highest = max(map(value, good))
        axes.set_ylim(0, 1.15 * highest)  # room for names above the last points
        _name_lines(figure, axes)
    return _saved(figure, directory, "simulation-split")


def draw_pipelines(rows: Rows, directory: Path) -> Path:
    """How busy an ingress is, and the first token, over the number of pipelines."""
    figure, (busy, first) = _figure(2, (10.0, 4.2))
    coarse = [row for row in rows if row["model"] == "coarse"]
    fine = [row for row in rows if row["model"] == "fine"]
    ingresses = sorted({row["ingresses"] for row in coarse})
    pipelines = sorted({row["pipelines"] for row in coarse})

    def text(number: int) -> str:
        return f"{number} ingress{'es' * (number > 1)}"

    def share(row: dict[str, Any]) -> float:
        return 100 * float(row["busy"]["ingress"])

    def first_ms(row: dict[str, Any]) -> float:
        return 1e3 * float(row["first_token_s"][1])

    _lines(busy, coarse, "ingresses", ingresses, "pipelines", share, text)
    busy.axhline(100, color="#555555", linewidth=1, linestyle="--")
    busy.set_title("How busy each ingress is; above 100 % it limits", loc="left")
    _log_axes(busy, pipelines, "pipelines of four stages", "% of its one core")
    _name_lines(figure, busy)
    can = [row for row in coarse if row["busy"]["ingress"] < 1]
    _lines(first, can, "ingresses", ingresses, "pipelines", first_ms, text)
    fine_points = sorted((row["pipelines"], first_ms(row)) for row in fine)
    first.plot(*zip(*fine_points, strict=True), "x:", color="#333333", label="1 ingress, each\nstep simulated")
    first.set_title("First token, 99 %, while ingresses keep up", loc="left")
    _log_axes(first, pipelines, "pipelines of four stages", "ms")
    first.set_yscale("linear")
    first.set_ylim(bottom=0)
    _name_lines(figure, first)
    return _saved(figure, directory, "simulation-pipelines")


def _figure(num_axes: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    return figure, list(figure.subplots(1, num_axes, squeeze=False)[0])


def _lines(
    axes: Axes,
    rows: Rows,
    key: str,
    values: Sequence[Any],
    x: str,
    y_of: Callable[[dict[str, Any]], float],
    text_of: Callable[[Any], str],
) -> None:
    """A line for each value of a key."""
    for value, colour in zip(values, COLOURS, strict=False):
        if points := sorted((row[x], y_of(row)) for row in rows if row[key] == value):
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=text_of(value))
    axes.set_xticks(sorted({row[x] for row in rows}))


def _name_lines(figure: Figure, axes: Axes) -> None:
    """Writes the names of lines at their ends, one above the other where they would overlap. Call it last."""
    left, right = axes.get_xlim()
    is_log = axes.get_xscale() == "log"
    axes.set_xlim(left, right * (right / left) ** 0.4 if is_log else right + 0.4 * (right - left))
    figure.draw_without_rendering()
    named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [np.asarray(line.get_xydata())[-1] for line in named]
    heights = [float(axes.transData.transform(end)[1]) * 72 / figure.dpi for end in ends]
    lowest = -np.inf
    for index in sorted(range(len(named)), key=heights.__getitem__):
        line, height, (x, y) = named[index], heights[index], map(float, ends[index])
        place = max(height, lowest + NAME_POINTS)
        axes.annotate(
            str(line.get_label()),
            (x, y),
            xytext=(7, place - height),
            textcoords="offset points",
            color=str(line.get_color()),
            va="center",
            fontsize=9,
        )
        lowest = place


def _log_axes(axes: Axes, ticks: Sequence[int], x_label: str, y_label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(ticks[0] * 0.85, ticks[-1] * 1.1)
    axes.set_xticks(list(ticks), list(map(str, ticks)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def _saved(figure: Figure, directory: Path, name: str) -> Path:
    path = directory / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
