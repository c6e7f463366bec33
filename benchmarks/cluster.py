"""A real cluster on slow links: its speed against the planner's formula, a network that fails, a node that is gone.

    python -m benchmarks.cluster                                1 ms and 10 ms, then the two faults
    python -m benchmarks.cluster --delays 5 --faults none

Makes five machines of network namespaces (root only), each with a link of 1 Gbit/s and a delay, has them form a
cluster by `gptj-dist up` and `gptj-dist join` alone, and serves the demo in four stages, one a machine. The fifth has
room for a stage that is lost.

- Speed: tokens/s of 1, 8 and 32 streams while they decode, against `docs/planning.md`: the time of a round is the sum
  of the stages' steps and of the links' times. Steps are timed in the same run, as `gptj-dist plan --check` times them;
  links are those that `gptj-dist nodes` shows.
- `cut`: the cable of a machine with a stage is pulled for 5 s while streams run. `gone`: it is pulled for good. The
  streams are compared byte for byte with the same ones undisturbed.

The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.cases import Case
from benchmarks.faults import Stream, differences, num_tokens, pause_ms
from benchmarks.figures import machine, print_document, print_row
from benchmarks.load import Target, closed_loop, request_times
from benchmarks.namespaces import Network, network
from benchmarks.processes import Family
from benchmarks.servers import READY_TIMEOUT_S, is_ready

NUM_MACHINES, NUM_STAGES = 5, 4
CPUS, CPUS_PER_STAGE = 2, 1.5
THREADS = 2
BATCHES = (1, 8, 32)
INPUT_LEN, OUTPUT_LEN = 32, 96
NUM_RUNS = 3
START_LIMIT_S = 300.0
LINKS_SETTLE_S = 40.0
"""Members look at their links every 15 s."""

CUT_S = 5.0
NUM_STREAMS = 8
STREAM_TOKENS = 200
MIDDLE_TOKENS = 40
PORT = 8000
POLL_S = 0.1


def main() -> None:
    args = parse_args()
    if os.geteuid() != 0:
        sys.exit("benchmarks.cluster makes network namespaces: it needs root")
    family = Family()
    with tempfile.TemporaryDirectory() as cache, network(NUM_MACHINES) as net:
        environment = {**family.environment, "XDG_CACHE_HOME": cache, "COLUMNS": "200"}
        environment.pop("RAY_ADDRESS", None)
        net.set_delay(args.delays[0])
        try:
            address = form_cluster(net, environment, Path(cache))
            base = serve(net, address, environment, Path(cache))
            speeds = [
                row for delay_ms in args.delays for row in measure_speed(net, address, base, delay_ms, environment)
            ]
            faults = [FAULTS[name](net, address, base, environment) for name in args.faults if name != "none"]
        finally:
            family.kill()
    print_document("cluster", {"machine": machine(), "speeds": speeds, "faults": faults})


def parse_args() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays", nargs="+", type=float, default=[1.0, 10.0], metavar="MS", help="of the links")
    parser.add_argument("--faults", nargs="+", choices=[*FAULTS, "none"], default=list(FAULTS), help="default: both")
    return parser.parse_args()


def form_cluster(net: Network, environment: Mapping[str, str], logs: Path) -> str:
    """`up` on the first machine, `join` on the others. Returns the cluster's address."""
    head = _start(net, 1, ["up", "--cpus", str(CPUS)], environment, logs / "up")
    code = _wait_for(head, logs / "up", r"gptj-dist join (\S+)")
    joined = {
        number: _start(net, number, ["join", code, "--cpus", str(CPUS)], environment, logs / f"join{number}")
        for number in net.machines[1:]
    }
    for number, process in joined.items():
        _wait_for(process, logs / f"join{number}", "Ctrl-C leaves")
        print((logs / f"join{number}").read_text().strip(), file=sys.stderr)
    return _wait_for(head, logs / "up", r"head at (\S+)")


def serve(net: Network, address: str, environment: Mapping[str, str], logs: Path) -> str:
    """Serves the demo from the first machine. Returns the URL."""
    options = f"--stages {NUM_STAGES} --dtype float32 --device cpu --no-speculation --insecure --address {address}"
    command = [
        *("serve", "demo", *options.split(), "--host", net.address(1), "--port", str(PORT)),
        *("--cpus-per-stage", str(CPUS_PER_STAGE), "--threads-per-stage", str(THREADS)),
    ]
    process = _start(net, 1, command, environment, logs / "serve")
    base, deadline_s = f"http://{net.address(1)}:{PORT}", time.monotonic() + READY_TIMEOUT_S
    while not is_ready(base):
        if process.poll() is not None or time.monotonic() > deadline_s:
            sys.exit(f"the server did not become ready:\n{(logs / 'serve').read_text()}")
        time.sleep(POLL_S)
    return base


def measure_speed(
    net: Network, address: str, base: str, delay_ms: float, environment: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Rows of tokens/s with links of a delay: measured, and by the formula."""
    net.set_delay(delay_ms)
    time.sleep(LINKS_SETTLE_S)
    shown = nodes(net, address, environment)
    hops_s = hops_of(shown)
    print_row(["delay ms", "streams", "tokens/s", "formula", "ratio", "stages ms", "links ms"])
    for batch in BATCHES:
        measured = median(decode_rate(base, batch, seed) for seed in range(NUM_RUNS))
        rows = -(-batch // min(batch, NUM_STAGES))
        steps_s = stage_steps_s(rows)
        wire_s = [latency_s + rows * row_bytes() / rate for latency_s, rate in hops_s]
        formula = batch / max(min(batch, NUM_STAGES) * max(steps_s), sum(steps_s) + sum(wire_s))
        row = {
            "delay_ms": delay_ms,
            "streams": batch,
            "tokens_s": measured,
            "formula_tokens_s": formula,
            "ratio": measured / formula,
            "stages_ms": 1e3 * sum(steps_s),
            "links_ms": 1e3 * sum(wire_s),
            "slower_links_named": sum(link["is_slower"] for link in shown["links"]),
        }
        print_row(list(row.values())[:-1])
        yield row


def decode_rate(base: str, batch: int, seed: int) -> float:
    """Tokens/s of streams that decode together: their number over the mean time of a token after the first one."""
    case = Case(batch, INPUT_LEN, OUTPUT_LEN)
    found = asyncio.run(closed_loop(Target(base, "demo"), case, batch, seed))
    if failed := [record.error for record in found.records if record.error is not None]:
        sys.exit(f"a stream failed: {failed[0]}")
    return batch / fmean(request_times(record)["tpot"] for record in found.records)


def stage_steps_s(rows: int) -> list[float]:
    """Seconds of a decode step of each stage alone, timed now by the stopwatch of `gptj-dist plan --check`."""
    from gptj_dist.planning.cost import Chunks
    from gptj_dist.stages.blueprint import draw_blueprint
    from gptj_dist.stages.stopwatch import open_team

    blueprint = draw_blueprint(_pipeline_config())
    specs = blueprint.stage_specs(["cpu"] * NUM_STAGES)
    case = Chunks(rows, 1, INPUT_LEN + OUTPUT_LEN // 2)
    with open_team([specs], "float32", THREADS) as team:
        return [median(team.time(index, case)[0] for _ in range(NUM_RUNS)) for index in range(NUM_STAGES)]


def row_bytes() -> int:
    """Of a row's hidden state between stages, in float32."""
    from gptj_dist.stages.blueprint import draw_blueprint

    return 4 * draw_blueprint(_pipeline_config()).model.d_model


def _pipeline_config() -> Any:
    from gptj_dist.config import PipelineConfig

    return PipelineConfig("demo", stages=NUM_STAGES, dtype="float32", device="cpu")


def nodes(net: Network, address: str, environment: Mapping[str, str]) -> Any:
    """What `gptj-dist nodes --json` shows."""
    command = net.command(1, [sys.executable, "-m", "gptj_dist", "nodes", "--json", "--address", address])
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def hops_of(shown: Any) -> list[tuple[float, float]]:
    """Latency and rate of each edge of the ring from coordinator to coordinator that leads to another machine."""
    at = {part.rpartition("/")[2]: node["node_id"] for node in shown["nodes"] for part in node["stages"]}
    links = {(link["from"], link["to"]): link for link in shown["links"]}
    ring = ["coordinator", *(f"stage-{index}" for index in range(NUM_STAGES)), "coordinator"]
    hops = []
    for one, other in pairwise(ring):
        if at[one] == at[other]:
            continue
        link = links[at[one], at[other]]
        latency_ms = link["latency_ms"] if link["latest_latency_ms"] is None else link["latest_latency_ms"]
        hops.append((latency_ms * 1e-3, link["mb_s"] * 1e6))
    return hops


def victim_of(net: Network, shown: Any) -> int:
    """A machine with a stage and nothing else of the server."""
    for node in shown["nodes"]:
        parts = {part.rpartition("/")[2] for part in node["stages"]}
        if parts and all(part.startswith("stage-") for part in parts) and node["address"] != net.address(1):
            return int(node["address"].rpartition(".")[2])
    sys.exit("every machine with a stage has another part of the server, too; try again")


def cut(net: Network, address: str, base: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Pulls a cable for `CUT_S`."""

    def harm(victim: int) -> None:
        net.cut(victim)
        time.sleep(CUT_S)
        net.heal(victim)

    return _disturbed("cut", net, address, base, environment, harm)


def gone(net: Network, address: str, base: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Pulls a cable for good."""
    return _disturbed("gone", net, address, base, environment, net.cut)


FAULTS: Mapping[str, Callable[[Network, str, str, Mapping[str, str]], dict[str, Any]]] = {"cut": cut, "gone": gone}


def _disturbed(
    name: str, net: Network, address: str, base: str, environment: Mapping[str, str], harm: Callable[[int], None]
) -> dict[str, Any]:
    """Runs streams undisturbed, and again with the harm in their middle; says how they differ, and their pause."""
    kinds = ("greedy", "seeded")
    usual, hit = (
        [Stream(kinds[i % 2], i, STREAM_TOKENS, salt=f"{name} {which}") for i in range(NUM_STREAMS)]
        for which in ("usual", "hit")
    )
    asyncio.run(_run_all(base, usual))
    shown = nodes(net, address, environment)
    victim = victim_of(net, shown)
    asyncio.run(_run_all(base, hit, lambda: harm(victim)))
    outcome = {
        "fault": name,
        "machine": net.address(victim),
        "streams": len(hit),
        "failed": sum(stream.record is None or stream.record.error is not None for stream in hit),
        "different": sum(bool(differences(a.content, b.content)) for a, b in zip(hit, usual, strict=True)),
        "pause_ms": max(pause_ms(stream) for stream in hit),
        "before": placement(shown),
        "after": placement(nodes(net, address, environment)),
    }
    print(json.dumps(outcome), file=sys.stderr)
    return outcome


async def _run_all(base: str, streams: Sequence[Stream], harm: Callable[[], None] | None = None) -> None:
    running = asyncio.gather(*(stream.run(base) for stream in streams))
    if harm is not None:
        while min(num_tokens(stream.content) for stream in streams) < MIDDLE_TOKENS and not running.done():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S / 10)  # frames set no event
        await asyncio.to_thread(harm)
    await running


def placement(shown: Any) -> dict[str, list[str]]:
    """What of the server is on which machine."""
    return {node["address"]: [part.rpartition("/")[2] for part in node["stages"]] for node in shown["nodes"]}


def _start(
    net: Network, number: int, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    command = net.command(number, [sys.executable, "-m", "gptj_dist", *arguments])
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _wait_for(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    deadline_s = time.monotonic() + START_LIMIT_S
    while (found := re.search(pattern, log.read_text())) is None:
        if process.poll() is not None or time.monotonic() > deadline_s:
            sys.exit(f"it did not say {pattern!r}:\n{log.read_text()}")
        time.sleep(POLL_S)
    return found[found.lastindex or 0]


if __name__ == "__main__":
    main()
