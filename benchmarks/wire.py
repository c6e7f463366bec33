"""What `--wire-dtype` gains where links are slow: a model in two stages, on two machines of network namespaces.

    gptj-dist synth deep deep
    python -m benchmarks.wire deep
    python -m benchmarks.wire deep --types same int8 --rates 10 100 --rounds 1

Root only. A server for each type, in turn, A B A B; with each, links of all rates. Each machine has one stage. Two
figures each: the time to the first token of one prompt of `--input-len` tokens, whose hidden states cross the link
once, and the tokens per second of `--streams` that decode, each of which sends a row for each token.
`share_of_fastest` is that rate as a share of the one with the fastest links of the same server, as machines become
slower and faster from one server to the next. The client's link has no limit. The last line on standard output is one
JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import Case
from benchmarks.figures import machine, print_document, print_row
from benchmarks.load import Measured, Target, closed_loop, failures, serving_figures
from benchmarks.namespaces import network
from benchmarks.processes import Family
from benchmarks.servers import stop
from benchmarks.sites import Site, form_cluster

CPUS = 1
OPTIONS = "--stages 2 --wait-nodes 2 --device cpu --cpus-per-stage 0.6 --no-speculation --no-prefix-cache"
NUM_PROMPTS = 3
SHORT_PROMPT, NUM_TOKENS = 8, 48
PARTS = ("first_ms", "tokens_per_s", "share_of_fastest")


def main() -> None:
    args = _options()
    if os.geteuid() != 0:
        sys.exit("benchmarks.wire makes network namespaces: it needs root")
    family = Family()
    with tempfile.TemporaryDirectory() as cache, network(2) as net:
        environment = {**family.environment, "XDG_CACHE_HOME": cache, "COLUMNS": "200"}
        environment.pop("RAY_ADDRESS", None)
        try:
            site = form_cluster(net, environment, Path(cache), CPUS)
            turns = [(name, number) for number in range(args.rounds) for name in args.types]
            runs = [row for name, number in turns for row in _run(args, site, name, number)]
        finally:
            family.kill()
    print_document("wire", {"machine": machine(), **vars(args), "medians": _medians(runs), "runs": runs})


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--types", nargs="+", default=["same", "int8"], help="of --wire-dtype")
    parser.add_argument("--rates", nargs="+", type=float, default=[10.0, 100.0, 1000.0], metavar="MBIT/S")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--streams", type=int, default=16)
    args = parser.parse_args(arguments)
    args.rates = list(dict.fromkeys(args.rates))
    return args


def _run(args: argparse.Namespace, site: Site, wire_dtype: str, number: int) -> list[dict[str, Any]]:
    """Serves with a type, and measures with links of each rate."""
    options = ["--dtype", args.dtype, "--wire-dtype", wire_dtype, "--served-model-name", args.model]
    server = site.serve(args.model, [*OPTIONS.split(), *options])
    rows = []
    try:
        target = Target(site.base, args.model)
        _measure(target, Case(1, args.input_len, 1), 1, seed=0)  # warm-up
        for rate in args.rates:
            site.net.set_rate(rate)
            prompts = _measure(target, Case(1, args.input_len, 1), NUM_PROMPTS, seed=number + 1)
            decodes = _measure(target, Case(args.streams, SHORT_PROMPT, NUM_TOKENS), args.streams, seed=number + 1)
            first_ms = serving_figures(prompts, {})["median_ttft_ms"]
            row = {"mbit_s": rate, "type": wire_dtype, "first_ms": first_ms, "tokens_per_s": _decode_rate(decodes)}
            print_row(list(row.values()))
            rows.append(row)
        site.net.set_rate(max(args.rates))
        [fastest] = [row["tokens_per_s"] for row in rows if row["mbit_s"] == max(args.rates)]
    finally:
        stop(server)
    return [{**row, "share_of_fastest": row["tokens_per_s"] / fastest} for row in rows]


def _measure(target: Target, case: Case, num_requests: int, seed: int) -> Measured:
    measured = asyncio.run(closed_loop(target, case, num_requests, seed))
    if failed := failures(measured):
        sys.exit(f"requests failed: {failed}")
    return measured


def _decode_rate(measured: Measured) -> float:
    """Tokens per second of streams that run together, from the time when all have their first token."""
    begin_s = max(record.frame_s[0] for record in measured.records)
    end_s = min(record.frame_s[-1] for record in measured.records)
    return sum(begin_s < at < end_s for record in measured.records for at in record.frame_s) / (end_s - begin_s)


def _medians(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each rate and type, with the medians of all rounds."""
    kinds = dict.fromkeys((run["mbit_s"], run["type"]) for run in runs)
    return [
        {
            "mbit_s": rate,
            "type": name,
            **{
                part: median(run[part] for run in runs if (run["mbit_s"], run["type"]) == (rate, name))
                for part in PARTS
            },
        }
        for rate, name in kinds
    ]


if __name__ == "__main__":
    main()
