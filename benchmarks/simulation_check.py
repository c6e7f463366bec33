"""Compares the simulation of a server with the server itself: tokens per second, and time to the first token.

    python -m benchmarks.simulation_check                                  1 to 4 stages that sleep, over HTTP
    python -m benchmarks.simulation_check --stages 1 4 --streams 1 32 --rates 4
    python -m benchmarks.simulation_check --model deep --dtype bfloat16 --stages 1 2       stages that compute

Without `--model`, stages sleep for `--step-ms` and `--row-ms` for each row in place of computing, so that 3 and 4 of
them do not share this machine's cores; HTTP, ingress, Ray Serve, coordinator, scheduler and transport are the real ones
(`benchmarks/timed`). With `--model`, stages share the cores evenly, and each takes the time that the planner's formula
has with the figures of `gptj-dist plan --check`, which are measured first. Client, ingress and coordinator share these
cores.

The costs of coordinator and ingress are measured in the same run: their CPU time under a closed loop of 1 and 32
streams. `--streams` are closed loops, `--rates` open ones, as shares of the rate at which the simulated server is full.
A ratio is predicted over measured; each case is run `--rounds` times, and the median of the measured figures counts.
The last line on standard output is one JSON document. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.figures import Figures, machine, medians, print_document, print_row
from benchmarks.load import Measured, Target, closed_loop, failures, open_loop
from benchmarks.processes import Family, content, cpu_s
from benchmarks.servers import free_port, running, serve_command
from benchmarks.timed.sitecustomize import VARIABLE
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.chunking import num_decode_groups
from gptj_dist.config import BLOCK_SIZE_TOKENS, DTypeName
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.operate.calibration import CheckedModel, check_pipeline
from gptj_dist.operate.simulation.costs import CoordinatorCosts, IngressCosts, ServerCosts
from gptj_dist.operate.simulation.fleet import EDGE_SHARE, Fleet, PipelineSpec
from gptj_dist.operate.simulation.load import ClosedLoop, Lengths, Load, OpenLoop
from gptj_dist.operate.simulation.outcome import Outcome, Trip, summed_up
from gptj_dist.operate.simulation.times import Edge, FormulaTimes, LineTimes, StepTimes
from gptj_dist.planning.forecast import PlannedStage, Workload
from gptj_dist.planning.partition import layer_ranges, plan_partition
from gptj_dist.stages.cores import available_cores

TIMED = Path(__file__).parent / "timed"
NUM_BLOCKS = 8192
MAX_BATCH = 64
SERVED_NAME = "benchmark"
START_TIMEOUT_S = 290
EDGE_S = 200e-6
"""Of a frame: 95 us on its way (`benchmarks.transport`), and what a process needs to wake up."""

COORDINATOR, INGRESS = ":Pipeline", ":Ingress"
"""Marks of processes' titles."""

NUM_COSTED = 16
COSTED_STREAMS = 32
COSTED_TOKENS = 32
PARTS = ("tokens_per_s", "first_ms", "first_p99_ms", "token_ms", "token_p99_ms")


@dataclass(frozen=True, slots=True)
class Server:
    """A server under measurement, and all its processes."""

    target: Target
    family: Family

    def cpu_s(self, mark: str) -> float:
        """CPU seconds of the processes whose title has this mark."""
        members = self.family.members()
        return sum(cpu_s(process) for process in members if mark.encode() in content(process / "cmdline"))


def main() -> None:
    args = _parser().parse_args()
    document: dict[str, Any] = {"machine": machine(), "model": args.model, "step_ms": args.step_ms}
    document |= {"row_ms": args.row_ms, "input_len": args.input_len, "output_len": args.output_len}
    found = {str(num_stages): _check(args, num_stages) for num_stages in args.stages}
    ratios = {part: [case["ratios"][part] for of in found.values() for case in of["cases"]] for part in PARTS}
    worst = {part: max((abs(ratio - 1) for ratio in some), default=0.0) for part, some in ratios.items()}
    print_document("simulation_check", document | {"stages": found, "worst_errors": worst})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory; without it stages of the demo sleep")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.3, 0.6], help="shares of the full rate")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--row-ms", type=float, default=0.5)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--requests", type=int, default=48, help="of each case, or two for each stream")
    parser.add_argument("--rounds", type=int, default=1)
    return parser


def _check(args: argparse.Namespace, num_stages: int) -> dict[str, Any]:
    times = _times(args, num_stages)
    cases = []
    with _server(args, num_stages) as server:
        _run(server, ClosedLoop(4, 8, Lengths(args.input_len, 4)))  # warm-up
        costs = _costs(server, args, num_stages, times)
        print_row([f"{num_stages} stages", "tokens/s", "first ms", "first 99 % ms", "each token ms", "99 % ms"])
        for name, load in _loads(args, num_stages, times, costs):
            predicted = _figures(_fleet(num_stages, times, costs).run(load))
            measured = medians([_figures(_run(server, load)) for _ in range(args.rounds)])
            print_row([f"{name}, predicted", *(predicted[part] for part in PARTS)])
            print_row([f"{name}, measured", *(measured[part] for part in PARTS)])
            ratios = {part: predicted[part] / measured[part] for part in PARTS}
            cases.append({"load": name, "predicted": predicted, "measured": measured, "ratios": ratios})
    return {"cases": cases, "costs": asdict(costs)}


def _times(args: argparse.Namespace, num_stages: int) -> StepTimes:
    """What stages take: as long as they sleep, or the formula with this machine's figures."""
    if args.model is None:
        return LineTimes((args.step_ms / 1e3,) * num_stages, (args.row_ms / 1e3,) * num_stages)
    model = read_model_config(resolve_model(args.model, None))
    dtype: DTypeName = args.dtype
    checked = check_pipeline(CheckedModel(args.model, None, model, dtype), num_stages, num_rounds=args.rounds)
    ranges = layer_ranges(plan_partition(model, num_stages))
    stages = [PlannedStage(device, layers) for device, layers in zip(checked.devices, ranges, strict=True)]
    return FormulaTimes(Workload(model, dtype, model.context_length), stages)


@contextmanager
def _server(args: argparse.Namespace, num_stages: int) -> Iterator[Server]:
    family, port = Family(), free_port()
    environment = family.environment
    if args.model is None:
        paths = [str(TIMED), *filter(None, [environment.get("PYTHONPATH")])]
        times = f"{args.step_ms / 1e3},{args.row_ms / 1e3}"
        environment |= {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: times}
    settings = {
        "stages": num_stages,
        "dtype": args.dtype,
        "max_batch_size": MAX_BATCH,
        "speculation": False,
        "prefix_cache": False,
    }
    threads = 1 if args.model is None else available_cores() // num_stages  # as `check_pipeline` has
    settings |= {"served_model_name": SERVED_NAME, "threads_per_stage": threads, "kv_cache_gb": 1}
    settings |= {"start_timeout_s": START_TIMEOUT_S}
    command = serve_command(args.model or "demo", settings, port)
    with running(command, environment, port, "/ready") as (base, _):
        yield Server(Target(base, SERVED_NAME), family)


def _shares_memory(num_stages: int, times: StepTimes) -> bool:
    """Whether the scheduler is told that stages share a memory: those that sleep say that they do not."""
    return num_stages > 1 and isinstance(times, FormulaTimes)


def _fleet(num_stages: int, times: StepTimes, costs: ServerCosts) -> Fleet:
    config = SchedulerConfig(
        num_stages,
        NUM_BLOCKS,
        BLOCK_SIZE_TOKENS,
        MAX_BATCH,
        (),
        shares_memory=_shares_memory(num_stages, times),
        can_share_blocks=False,
        keeps_prefixes=False,
    )
    return Fleet([PipelineSpec(config, times, [Edge(EDGE_S)] * (num_stages + 1))], costs=costs)


def _loads(
    args: argparse.Namespace, num_stages: int, times: StepTimes, costs: ServerCosts
) -> Iterator[tuple[str, Load]]:
    lengths = Lengths(args.input_len, args.output_len)
    for streams in args.streams:
        yield (
            f"{streams} streams",
            ClosedLoop(streams, max(2 * streams, min(args.requests, 8 * streams)), lengths, seed=1),
        )
    if args.rates:
        full = _fleet(num_stages, times, costs).run(ClosedLoop(MAX_BATCH, 3 * MAX_BATCH, lengths))
        for share in args.rates:
            rate = share * full.tokens_per_s / args.output_len
            yield f"{share:.0%} ({rate:.2f}/s)", OpenLoop(rate, args.requests, lengths, seed=1)


def _run(server: Server, load: Load) -> Outcome:
    """Sends a load; sums up as the simulation does."""
    lengths, number = load.lengths, load.num_requests
    if isinstance(load, ClosedLoop):
        case = Case(load.num_streams, int(lengths.prompt_tokens), int(lengths.output_tokens))
        measured = asyncio.run(closed_loop(server.target, case, number, load.seed))
        return _summed_up(measured, 0.0, 1.0)
    case = Case(1, int(lengths.prompt_tokens), int(lengths.output_tokens))
    measured = asyncio.run(open_loop(server.target, case, number, load.rate, load.seed))
    return _summed_up(measured, EDGE_SHARE, 1 - EDGE_SHARE)


def _summed_up(measured: Measured, first_share: float, last_share: float) -> Outcome:
    """Of requests that began in a part of the time, or for a closed loop until the last token."""
    if broken := failures(measured):
        sys.exit(f"requests failed: {broken}")
    records = sorted(measured.records, key=lambda record: record.begin_s)
    trips = [Trip(r.begin_s, r.num_tokens, r.frame_s[0], r.frame_s[-1]) for r in records]
    begin_s = trips[0].came_s
    end_s = max(trip.last_s for trip in trips) if last_share == 1 else trips[-1].came_s
    seconds = end_s - begin_s
    return summed_up(trips, {"all": 0.0}, begin_s + first_share * seconds, begin_s + last_share * seconds)


def _costs(server: Server, args: argparse.Namespace, num_stages: int, times: StepTimes) -> ServerCosts:
    """The CPU time of coordinator and ingress, and the delay of a call, from loads that are not compared.

    A token costs `message + token` if it comes alone, and `message / n + token` in messages of n tokens.
    """
    short = ClosedLoop(1, NUM_COSTED, Lengths(args.input_len, 1))
    long = ClosedLoop(1, NUM_COSTED // 2, Lengths(args.input_len, COSTED_TOKENS))
    many = ClosedLoop(COSTED_STREAMS, COSTED_STREAMS, Lengths(args.input_len, COSTED_TOKENS))
    used: list[dict[str, float]] = []
    for load in (short, long, many):
        before = {mark: server.cpu_s(mark) for mark in (COORDINATOR, INGRESS)}
        outcome = _run(server, load)
        after = {mark: server.cpu_s(mark) - before[mark] for mark in before}
        used.append({**after, "first_s": outcome.first_token_s[0], "requests": load.num_requests})
    together = COSTED_STREAMS / num_decode_groups(COSTED_STREAMS, num_stages, _shares_memory(num_stages, times))
    figures: dict[str, tuple[float, float, float]] = {}
    for mark in (COORDINATOR, INGRESS):
        request_s = used[0][mark] / used[0]["requests"]
        alone_s, together_s = (
            max(0.0, some[mark] / some["requests"] - request_s) / (COSTED_TOKENS - 1) for some in used[1:]
        )
        message_s = max(0.0, (alone_s - together_s) / (1 - 1 / together))
        token_s = max(0.0, alone_s - message_s)
        figures[mark] = max(0.0, request_s - alone_s), message_s, token_s
    costs = ServerCosts(
        CoordinatorCosts(figures[COORDINATOR][0], figures[COORDINATOR][1], 0.0, figures[COORDINATOR][2]),
        IngressCosts(*figures[INGRESS]),
    )
    predicted_s = _fleet(num_stages, times, costs).run(short).first_token_s[0]
    delay_s = max(0.0, used[0]["first_s"] - predicted_s)
    return replace(costs, ingress=replace(costs.ingress, call_delay_s=delay_s))


def _figures(outcome: Outcome) -> Figures:
    times_s = (*outcome.first_token_s, *outcome.token_s)
    return dict(zip(PARTS, (outcome.tokens_per_s, *(1e3 * seconds for seconds in times_s)), strict=True))


if __name__ == "__main__":
    main()
