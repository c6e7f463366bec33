"""A real cluster on slow links: its speed against the planner's formula, a network that fails, a node that is gone.

    python -m benchmarks.cluster                                1 ms and 10 ms, then the faults
    python -m benchmarks.cluster --delays 5 --faults none

Makes six machines of network namespaces (root only), each with a link of 1 Gbit/s and a delay, has them form a
cluster by `gptj-dist up` and `gptj-dist join` alone, and serves the demo in four stages, one a machine. Two have room
for stages that are lost.

- Speed: tokens/s of 1, 8 and 32 streams while all of them decode, against `docs/planning.md`: a round takes the sum of
  the stages' steps and of the links' times, or the steps of its plans on the slowest stage. The steps' times are those
  that the stages report meanwhile (`gptj_dist_stage_step_seconds`): stages that share two cores and their caches are
  slower than alone. The links' times are those that `gptj-dist nodes` shows.
- `cut`: the cable of a machine with a stage is pulled for 5 s while streams run. `leave`: the machine leaves by
  `gptj-dist leave`. `gone`: its cable is pulled for good. The streams are compared byte for byte with the same ones
  undisturbed.

The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.faults import Stream, differences, num_tokens, pause_ms
from benchmarks.figures import machine, print_document, print_row
from benchmarks.namespaces import Network, network
from benchmarks.processes import Family
from benchmarks.sites import POLL_S, Site, form_cluster

NUM_MACHINES, NUM_STAGES = 6, 4
CPUS = 2
OPTIONS = (
    f"--stages {NUM_STAGES} --cpus-per-stage 1.5 --threads-per-stage 2 --wait-nodes {NUM_MACHINES} --dtype float32 "
    "--device cpu --no-speculation"
)
BATCHES = (1, 8, 32)
SPEED_TOKENS, FIRST_TOKENS = 160, 5
STEP_METRIC = "gptj_dist_stage_step_seconds"
NUM_RUNS = 3
LINKS_SETTLE_S = 40.0
"""Members look at their links every 15 s."""

CUT_S = 5.0
NUM_STREAMS = 8
STREAM_TOKENS = 200
MIDDLE_TOKENS = 40


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
            site = form_cluster(net, environment, Path(cache), CPUS)
            site.serve("demo", OPTIONS.split())
            speeds = [row for delay_ms in args.delays for row in measure_speed(site, delay_ms)]
            faults = [FAULTS[name](site) for name in args.faults if name != "none"]
        finally:
            family.kill()
    print_document("cluster", {"machine": machine(), "speeds": speeds, "faults": faults})


def parse_args() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays", nargs="+", type=float, default=[1.0, 10.0], metavar="MS", help="of the links")
    parser.add_argument("--faults", nargs="+", choices=[*FAULTS, "none"], default=list(FAULTS), help="default: all")
    return parser.parse_args()


def measure_speed(site: Site, delay_ms: float) -> Iterator[dict[str, Any]]:
    """Rows of tokens/s with links of a delay: measured, and by the formula."""
    site.net.set_delay(delay_ms)
    time.sleep(LINKS_SETTLE_S)
    shown = site.nodes()
    hops_s = hops_of(shown)
    print_row(["delay ms", "streams", "tokens/s", "formula", "ratio", "rows", "stages ms", "links ms"])
    for batch in BATCHES:
        windows = [asyncio.run(decode_window(site.base, batch, f"{delay_ms} {run}")) for run in range(NUM_RUNS)]
        for window in sorted(windows, key=lambda window: window.tokens_s)[NUM_RUNS // 2 :][:1]:
            wire_s = sum(latency_s + window.rows * row_bytes() / rate for latency_s, rate in hops_s)
            in_turn_s, busiest_s = sum(window.steps_s) + wire_s, batch / window.rows * max(window.steps_s)
            formula = batch / max(in_turn_s, busiest_s)
            row = {
                "delay_ms": delay_ms,
                "streams": batch,
                "tokens_s": window.tokens_s,
                "formula_tokens_s": formula,
                "ratio": window.tokens_s / formula,
                "rows": window.rows,
                "stages_ms": 1e3 * sum(window.steps_s),
                "links_ms": 1e3 * wire_s,
                "slower_links_named": sum(link["is_slower"] for link in shown["links"]),
            }
            print_row(list(row.values())[:-1])
            yield row


class Window(NamedTuple):
    """A time in which all streams decode.

    Args:
        rows: mean tokens of a plan.
        steps_s: mean seconds of each stage's step.
    """

    tokens_s: float
    rows: float
    steps_s: list[float]


async def decode_window(base: str, batch: int, salt: str) -> Window:
    """Runs streams together; looks at the time from when all have some tokens until the first one is near its end."""
    streams = [Stream("greedy", number % NUM_STREAMS, SPEED_TOKENS, salt=salt) for number in range(batch)]
    running = asyncio.gather(*(stream.run(base) for stream in streams))
    async with httpx.AsyncClient(base_url=base, timeout=30) as client:
        looks = []
        for of, limit in ((min, FIRST_TOKENS), (max, SPEED_TOKENS - FIRST_TOKENS)):
            await _have_come(streams, running, of, limit)
            tokens, at_s = sum(num_tokens(stream.content) for stream in streams), time.monotonic()
            looks.append((tokens, at_s, step_sums((await client.get("/metrics")).text)))
    await running
    if failed := [stream.record for stream in streams if stream.record is None or stream.record.error is not None]:
        sys.exit(f"a stream failed: {failed[0]}")
    (tokens, begin_s, before), (more_tokens, end_s, after) = looks
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]
    num_tokens_new = more_tokens - tokens
    return Window(
        num_tokens_new / (end_s - begin_s),
        num_tokens_new / steps[0][1],
        [seconds / count for seconds, count in steps],
    )


def step_sums(metrics: str) -> list[tuple[float, float]]:
    """Seconds and number of the steps of each stage so far."""
    sums = {
        (int(sample.labels["stage"]), sample.name): sample.value
        for family in text_string_to_metric_families(metrics)
        if family.name == STEP_METRIC
        for sample in family.samples
    }
    return [(sums[i, f"{STEP_METRIC}_sum"], sums[i, f"{STEP_METRIC}_count"]) for i in range(NUM_STAGES)]


def row_bytes() -> int:
    """Of a row's hidden state between stages, in float32."""
    from gptj_dist.config import PipelineConfig
    from gptj_dist.stages.blueprint import draw_blueprint

    return 4 * draw_blueprint(PipelineConfig("demo", stages=NUM_STAGES, dtype="float32", device="cpu")).model.d_model


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


def cut(site: Site) -> dict[str, Any]:
    """Pulls the cable of a machine with a stage for `CUT_S`."""

    def harm(victim: int) -> None:
        site.net.cut(victim)
        time.sleep(CUT_S)
        site.net.heal(victim)

    return _disturbed("cut", site, harm)


def leave(site: Site) -> dict[str, Any]:
    """Has a machine with a stage leave the cluster."""
    return _disturbed(
        "leave",
        site,
        lambda victim: print(site.gptj_dist(victim, "leave", "--pid", str(site.joined[victim].pid)), file=sys.stderr),
    )


def gone(site: Site) -> dict[str, Any]:
    """Pulls the cable of a machine with a stage for good."""
    return _disturbed("gone", site, site.net.cut)


FAULTS: Mapping[str, Callable[[Site], dict[str, Any]]] = {"cut": cut, "leave": leave, "gone": gone}


def _disturbed(name: str, site: Site, harm: Callable[[int], None]) -> dict[str, Any]:
    """Runs streams undisturbed, and again with the harm in their middle; says how they differ, and their pause."""
    kinds = ("greedy", "seeded")
    usual, hit = (
        [Stream(kinds[i % 2], i, STREAM_TOKENS, salt=f"{name} {which}") for i in range(NUM_STREAMS)]
        for which in ("usual", "hit")
    )
    asyncio.run(_run_all(site.base, usual))
    shown = site.nodes()
    victim = victim_of(site.net, shown)
    asyncio.run(_run_all(site.base, hit, lambda: harm(victim)))
    outcome = {
        "fault": name,
        "machine": site.net.address(victim),
        "streams": len(hit),
        "failed": sum(stream.record is None or stream.record.error is not None for stream in hit),
        "different": sum(bool(differences(a.content, b.content)) for a, b in zip(hit, usual, strict=True)),
        "pause_ms": max(pause_ms(stream) for stream in hit),
        "before": placement(shown),
        "after": placement(site.nodes()),
    }
    print(json.dumps(outcome), file=sys.stderr)
    return outcome


async def _run_all(base: str, streams: Sequence[Stream], harm: Callable[[], None] | None = None) -> None:
    running = asyncio.gather(*(stream.run(base) for stream in streams))
    if harm is not None:
        await _have_come(streams, running, min, MIDDLE_TOKENS)
        await asyncio.to_thread(harm)
    await running


async def _have_come(
    streams: Sequence[Stream], running: asyncio.Future[list[None]], of: Callable[[Iterable[int]], int], limit: int
) -> None:
    """Waits until `of` the streams' tokens is a limit."""
    while of(num_tokens(stream.content) for stream in streams) < limit and not running.done():  # noqa: ASYNC110
        await asyncio.sleep(POLL_S / 10)  # frames set no event


def placement(shown: Any) -> dict[str, list[str]]:
    """What of the server is on which machine."""
    return {node["address"]: [part.rpartition("/")[2] for part in node["stages"]] for node in shown["nodes"]}


if __name__ == "__main__":
    main()
