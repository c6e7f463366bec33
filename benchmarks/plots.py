"""Draws the results of other benchmarks as SVG.

    python -m benchmarks.http --model deep --concurrency 1 2 4 8 16 32 64 > http.log
    python -m benchmarks.http --model deep --concurrency --request-rate 0.5 1 2 4 > load.log
    python -m benchmarks.offline deep --stages 1 2 --growth > growth.log
    python -m benchmarks.plots http.log load.log growth.log --to docs/plots

Reads the last line of each file, a document of `benchmarks.http` or `benchmarks.offline`, and draws what it holds:
throughput against concurrency, time to first token against load, occupancy of stages, growth with requests and with
context. Documents of one kind share a plot, with a line each; `NAME=FILE` names the line. The last line on standard
output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.figures import print_document

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.figsize": (6.4, 4.0),
    "font.size": 10,
    "lines.marker": "o",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "gptj-dist",
}
Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One document's line in a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot's file name, its axes with units, and the function that finds its lines in a document."""

    name: str
    x_label: str
    y_label: str
    lines_of: Callable[[str, Document], Sequence[Line]]
    is_x_logarithmic: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=parse_source, metavar="[NAME=]FILE", help="outputs of benchmarks")
    parser.add_argument("--to", type=Path, default=Path("docs/plots"), help="a directory")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    documents = [(name, read_document(path)) for name, path in args.files]
    mpl.rcParams.update(STYLE)
    drawn = {
        plot.name: [line for name, document in documents for line in plot.lines_of(name, document)] for plot in PLOTS
    }
    files = [draw(plot, drawn[plot.name], args.to) for plot in PLOTS if drawn[plot.name]]
    print_document("plots", {"files": [str(path) for path in files]})


def parse_source(text: str) -> tuple[str, Path]:
    """Parses `[NAME=]FILE`. Without a name, takes the file's stem."""
    name, separator, path = text.rpartition("=")
    return (name if separator else Path(path).stem), Path(path)


def read_document(path: Path) -> Document:
    """The last line of a benchmark's output."""
    document: Document = json.loads(path.read_text().splitlines()[-1])
    return document


def draw(plot: Plot, lines: Sequence[Line], directory: Path) -> Path:
    """Writes the plot; returns its file."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for line in lines:
        axes.plot(line.x, line.y, label=line.label)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.set_ylim(bottom=0)
    if plot.is_x_logarithmic:
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.legend()
    path = directory / f"{plot.name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def _closed_loop(figure: str) -> Callable[[str, Document], Sequence[Line]]:
    return lambda name, document: _of_loads(name, document.get("closed_loop", ()), "max_concurrency", figure)


def _open_loop(figure: str) -> Callable[[str, Document], Sequence[Line]]:
    def lines(name: str, document: Document) -> Sequence[Line]:
        loads = document.get("open_loop", ())
        medians = _of_loads(f"{name}, median", loads, "request_rate", f"median_{figure}")
        return [*medians, *_of_loads(f"{name}, 99 %", loads, "request_rate", f"p99_{figure}")]

    return lines


def _of_loads(label: str, loads: Sequence[Document], x: str, y: str) -> Sequence[Line]:
    points = [(load[x], load[y]) for load in loads if y in load]
    return [_line(label, points)] if points else []


def _occupancy(name: str, document: Document) -> Sequence[Line]:
    """Lines of pipelines only: a single stage shares its process with the rest of the engine."""
    pipelines = [variant for variant in _variants(document) if variant["settings"]["stages"] > 1]
    return [line for variant in pipelines for line in _stage_lines(name, variant)]


def _stage_lines(name: str, variant: Document) -> Sequence[Line]:
    cases = _grown_in_requests(variant["cases"])
    stages = range(variant["settings"]["stages"])
    points = [[(case["batch"], 100 * case["figures"][f"stage_{i}_cores"]) for case in cases] for i in stages]
    return [_line(f"{name}, stage {i} of {len(stages)}", points[i]) for i in stages]


def _growth_in_requests(name: str, document: Document) -> Sequence[Line]:
    return [
        _line(_label(name, variant), [(case["batch"], _output_throughput(case)) for case in cases])
        for variant in _variants(document)
        if len(cases := _grown_in_requests(variant["cases"])) > 1
    ]


def _growth_in_context(name: str, document: Document) -> Sequence[Line]:
    lines = []
    for variant in _variants(document):
        for phase in ("prefill", "decode"):
            cases = [case for case in variant["cases"] if f"{phase}_tokens_per_s" in case["figures"]]
            batch = max((case["batch"] for case in cases if _is_grown_in_context(case, cases)), default=0)
            points = [(c["input_len"], c["figures"][f"{phase}_tokens_per_s"]) for c in cases if c["batch"] == batch]
            lines += [_line(f"{_label(name, variant)}, {phase}, {batch} requests", points)] if batch else []
    return lines


def _is_grown_in_context(case: Document, cases: Sequence[Document]) -> bool:
    return any(other["batch"] == case["batch"] and other["input_len"] != case["input_len"] for other in cases)


def _grown_in_requests(cases: Sequence[Document]) -> Sequence[Document]:
    """The cases with the shortest prompts, which differ in their number of requests."""
    shortest = min(case["input_len"] for case in cases)
    return [case for case in cases if case["input_len"] == shortest]


def _output_throughput(case: Document) -> float:
    return float(case["figures"]["output_throughput"])


def _variants(document: Document) -> Sequence[Document]:
    variants: Sequence[Document] = document.get("variants", ())
    return variants


def _label(name: str, variant: Document) -> str:
    return f"{name}, {variant['settings']['stages']} stage(s), {variant['settings']['dtype']}"


def _line(label: str, points: Sequence[tuple[float, float]]) -> Line:
    x, y = zip(*sorted(points), strict=True)
    return Line(label, x, y)


PLOTS = (
    Plot("throughput", "clients at once", "output tokens/s", _closed_loop("output_throughput"), True),
    Plot("first-token", "requests/s", "time to first token, ms", _open_loop("ttft_ms")),
    Plot("occupancy", "requests at once", "stage busy, % of a core", _occupancy, True),
    Plot("growth-requests", "requests at once", "output tokens/s", _growth_in_requests, True),
    Plot("growth-context", "prompt tokens of each request", "tokens/s", _growth_in_context),
)

if __name__ == "__main__":
    main()
