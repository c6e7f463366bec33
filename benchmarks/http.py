"""Measures a server with OpenAI's API from outside: throughput, time to first token and time of each later token.

    python -m benchmarks.http                                   starts `gptj-dist serve demo --stages 2`, measures it
    python -m benchmarks.http --model deep --serve-args "--stages 1" --concurrency 1 2 4 8 16 32 64
    python -m benchmarks.http --base http://127.0.0.1:9000 --model NAME              a server that runs already
    python -m benchmarks.http --model deep --request-rate 0.5 1 2 4 --goodput ttft:500 tpot:100

`--concurrency N` is a closed loop: N clients, each of which sends its next request when its last one has ended.
`--request-rate R` is an open loop: requests at random times (a Poisson process), R a second on average, whether or not
others have ended. Prompts are `--input-len` random token ids; outputs are greedy and do not end early. Requests are
streamed. One frame can carry several tokens, so tokens are counted by the server (`usage`), and `itl` is the time
between frames.

Figures have the names that vLLM's serving benchmark prints, times in ms. `ttft` begins before the connection is made.
Goodput counts requests within all given limits, in ms. The last line on standard output is one JSON document. To
compare two servers in turn, see `benchmarks.compare`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.cases import Case
from benchmarks.figures import machine, print_document, print_row
from benchmarks.load import Measured, Target, closed_loop, failures, open_loop, serving_figures
from benchmarks.servers import started

COLUMNS = ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "failed")
NUM_WARM_UP = 4
WARM_UP_TOKENS = 4
GOODPUT_NAMES = ("ttft", "tpot", "e2el")


def main() -> None:
    args = _parser().parse_args()
    goodput_ms = dict(args.goodput)
    document: dict[str, Any] = {"machine": machine(), "model": args.model, "server": args.base or args.serve_args}
    document |= {"input_len": args.input_len, "output_len": args.output_len, "goodput_ms": goodput_ms}
    with _server(args) as (target, ready):
        asyncio.run(closed_loop(target, Case(NUM_WARM_UP, args.input_len, WARM_UP_TOKENS), NUM_WARM_UP, seed=0))
        print_row(["", *COLUMNS])
        closed = [
            _report("max_concurrency", number, _closed(args, target, number), goodput_ms) for number in args.concurrency
        ]
        open_ = [_report("request_rate", rate, _open(args, target, rate), goodput_ms) for rate in args.request_rate]
    print_document("http", document | ready | {"closed_loop": closed, "open_loop": open_})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a running server; without it one is started")
    parser.add_argument("--model", default="demo", help="the model to serve, or its name on the running server")
    parser.add_argument("--serve-args", default="--stages 2", help="arguments of gptj-dist serve")
    parser.add_argument("--concurrency", nargs="*", type=int, default=[1, 8, 32], help="clients at once")
    parser.add_argument("--requests-per-client", type=int, default=4)
    parser.add_argument("--request-rate", nargs="*", type=float, default=[], help="requests per second")
    parser.add_argument("--num-requests", type=int, default=64, help="at each request rate")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--goodput", nargs="+", type=parse_goodput, default=[], metavar="NAME:MS", help="ttft:200 ...")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and arrivals")
    return parser


def parse_goodput(text: str) -> tuple[str, float]:
    """Parses `ttft:200`. Raises ValueError on anything else."""
    name, _, most_ms = text.partition(":")
    if name not in GOODPUT_NAMES:
        raise ValueError(f"{name!r} is not one of {', '.join(GOODPUT_NAMES)}")
    return name, float(most_ms)


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[Target, dict[str, float]]]:
    """The server to measure; if it is started here, also the seconds until it was ready."""
    if args.base is not None:
        yield Target(args.base, args.model), {}
        return
    with started(args.model, args.serve_args.split()) as (base, ready_s):
        print(f"ready after {ready_s:.1f} s", flush=True)
        yield Target(base, args.model), {"seconds_to_ready": ready_s}


def _closed(args: argparse.Namespace, target: Target, concurrency: int) -> Measured:
    case = Case(concurrency, args.input_len, args.output_len)
    return asyncio.run(closed_loop(target, case, concurrency * args.requests_per_client, args.seed + concurrency))


def _open(args: argparse.Namespace, target: Target, rate: float) -> Measured:
    case = Case(1, args.input_len, args.output_len)
    return asyncio.run(open_loop(target, case, args.num_requests, rate, args.seed))


def _report(name: str, value: float, measured: Measured, goodput_ms: dict[str, float]) -> dict[str, Any]:
    """Computes a load's figures and prints them as a line of the table."""
    figures = serving_figures(measured, goodput_ms)
    print_row([f"{name} {value:g}", *(figures.get(column, "-") for column in COLUMNS)])
    errors = failures(measured)
    return {name: value, **figures} | ({"errors": errors} if errors else {})


if __name__ == "__main__":
    main()
