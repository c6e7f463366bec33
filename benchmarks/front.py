"""Measures what HTTP, Serve and server-sent events cost: CPU time per token and per request, by kind of process.

    python -m benchmarks.front                                    every way in, the demo model in one stage
    python -m benchmarks.front --ways ingress proxy --streams 1 8 32 128 --rounds 3

Ways in: `ingress` is `gptj-dist serve` with a local Ray, where the ingress itself listens; `proxy` is the same
application on a Ray cluster, after Serve's proxy; `proxy-throughput` adds `RAY_SERVE_THROUGHPUT_OPTIMIZED=1`; `haproxy`
uses HAProxy (`RAY_SERVE_ENABLE_HA_PROXY=1`); `engine` is the same pipeline in one process, without Ray and HTTP.

A request's cost is the CPU time of a stream of one token. A token's cost is the CPU time of streams of `--output-len`
tokens, less that of the same streams with one token, divided by the tokens in between. `limit_tokens_per_s` is the rate
at which the ingress, one process on one core, would be busy all the time. Also reported: how long the server takes to
be ready and to stop, and which of its ports other machines can reach. The last line on standard output is one JSON
document. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import EngineContender
from benchmarks.figures import Figures, machine, medians, print_document, print_row
from benchmarks.load import Target, closed_loop, failures, serving_figures
from benchmarks.processes import Family, content, cpu_s, open_addresses
from benchmarks.servers import free_port, ray_cluster, running, serve_command
from benchmarks.worker_process import WorkerProcess
from gptj_dist.operate.launch.environment import LOCAL_RAY_ENVIRONMENT

SERVED_NAME = "benchmark"
RAY_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "proxy": {},
    "proxy-throughput": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
}
ALL_WAYS = ["engine", "ingress", *RAY_SETTINGS]
ROLES = {
    ":Ingress": "ingress",
    ":Pipeline": "coordinator",
    "ProxyActor": "proxy",
    "haproxy": "proxy",
    ":stage-": "stages",
}
LEAST_REQUESTS = 64
"""Enough for CPU times, which the kernel counts in hundredths of a second."""


def main() -> None:
    args = _parser().parse_args()
    print_row(["", "tokens/s", "ttft ms", "us/token", "of ingress", "us/request", "of ingress"])
    ways = {way: _measure(way, args) for way in args.ways}
    print_document("front", {"machine": machine(), "model": args.model, "ways": ways})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=ALL_WAYS, default=ALL_WAYS)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32, 128], help="streams at once")
    parser.add_argument("--input-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


@dataclass(frozen=True, slots=True)
class Front:
    """A server under measurement.

    Args:
        family: all its processes.
    """

    target: Target
    family: Family


def _measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    if way == "engine":
        settings = {"model": args.model, "stages": args.stages, "dtype": "float32", "max_batch_size": max(args.streams)}
        with closing(WorkerProcess("ours", settings)) as worker:
            return {"loads": [_engine_load(EngineContender(worker), streams, args) for streams in args.streams]}
    begin = time.perf_counter()
    with _server(way, args) as front:
        figures: dict[str, Any] = {"seconds_to_ready": time.perf_counter() - begin}
        figures["open_to_others"] = sorted(open_addresses(front.family))
        figures["loads"] = [_load(way, front, streams, args) for streams in args.streams]
        begin = time.perf_counter()
    return figures | {"seconds_to_stop": time.perf_counter() - begin}


@contextmanager
def _server(way: str, args: argparse.Namespace) -> Iterator[Front]:
    family, port = Family(), free_port()
    options = {"stages": args.stages, "dtype": "float32", "served_model_name": SERVED_NAME}
    options["max_batch_size"] = max(64, *args.streams)
    target = Target(f"http://127.0.0.1:{port}", SERVED_NAME)
    if way == "ingress":
        with running(serve_command(args.model, options, port), family.environment, port, "/ready"):
            yield Front(target, family)
        return
    environment = {**family.environment, **LOCAL_RAY_ENVIRONMENT}
    with ray_cluster({**environment, **RAY_SETTINGS[way]}) as address:
        command = serve_command(args.model, options | {"address": address}, port)
        with running(command, environment, port, "/ready"):
            yield Front(target, family)


def _engine_load(engine: EngineContender, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    case = Case(streams, args.input_len, args.output_len)
    engine.measure(case, seed=0)
    figures = medians([engine.measure(case, seed=2 + 2 * number) for number in range(args.rounds)])
    print_row([f"engine, {streams} streams", figures["output_throughput"]])
    return {"streams": streams, "output_throughput": figures["output_throughput"]}


def _load(way: str, front: Front, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    num_requests = max(streams, LEAST_REQUESTS)
    asyncio.run(closed_loop(front.target, Case(streams, args.input_len, 2), streams, seed=0))
    runs = [_round(front, streams, num_requests, args, seed=10 + 2 * number) for number in range(args.rounds)]
    figures = medians(runs)
    figures["limit_tokens_per_s"] = 1e6 / figures["ingress_us_per_token"]
    names = ("output_throughput", "median_ttft_ms", "us_per_token", "ingress_us_per_token")
    row = [figures[name] for name in (*names, "us_per_request", "ingress_us_per_request")]
    print_row([f"{way}, {streams} streams", *row])
    return {"streams": streams, **figures}


def _round(front: Front, streams: int, num_requests: int, args: argparse.Namespace, seed: int) -> Figures:
    """Runs prompts with one token each, and others with many; the difference is the cost of tokens."""
    short, _ = _run(front, Case(streams, args.input_len, 1), num_requests, seed)
    whole, figures = _run(front, Case(streams, args.input_len, args.output_len), num_requests, seed + 1)
    num_tokens = num_requests * (args.output_len - 1)
    roles = sorted(set(short) | set(whole))
    a_token = {
        f"{role}_us_per_token": 1e6 * (whole.get(role, 0.0) - short.get(role, 0.0)) / num_tokens for role in roles
    }
    a_request = {f"{role}_us_per_request": 1e6 * short.get(role, 0.0) / num_requests for role in roles}
    front_roles = [role for role in roles if role != "stages"]
    sums = {
        "us_per_token": sum(a_token[f"{role}_us_per_token"] for role in front_roles),
        "us_per_request": sum(a_request[f"{role}_us_per_request"] for role in front_roles),
    }
    return figures | sums | a_token | a_request


def _run(front: Front, case: Case, num_requests: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """CPU seconds by role, and the clients' figures."""
    before = _cpu_s_by_role(front.family)
    measured = asyncio.run(closed_loop(front.target, case, num_requests, seed))
    used = {role: seconds - before.get(role, 0.0) for role, seconds in _cpu_s_by_role(front.family).items()}
    if broken := failures(measured):
        sys.exit(f"{front.target.base} failed: {broken}")
    figures = serving_figures(measured, {})
    return used, {name: figures[name] for name in ("output_throughput", "median_ttft_ms")}


def _cpu_s_by_role(family: Family) -> dict[str, float]:
    used: defaultdict[str, float] = defaultdict(float)
    for process in family.members():
        title = content(process / "cmdline").replace(b"\0", b" ").decode(errors="replace")
        role = next((role for mark, role in ROLES.items() if mark in title), "others")
        used[role] += cpu_s(process)
    return used


if __name__ == "__main__":
    main()
