"""Simulates pipelines of 1 to 64 stages and 1 to 1,000 pipelines: rates, latencies, and what limits first; with plots.

    python -m benchmarks.simulation --to docs/images                       all parts, about twenty minutes
    python -m benchmarks.simulation --parts links slow                     two of them

    stages      tokens/s of 1 to 512 streams over 1 to 64 stages, and what limits each
    links       what links of 0.1 to 30 ms cost four stages
    slow        what one slow stage of four costs
    split       eight devices: one pipeline of eight stages, two of four, four of two, or eight of one
    pipelines   1 to 1,000 pipelines of four stages behind 1 to 64 ingresses: the coarse simulation, and the fine one

`stages` takes a model of GPT-J-6B's width with 64 layers, the others GPT-J-6B; both in 16 bit. Devices are `l4` of
`gptj-dist plan`, or those of `--device`, whose name then ends the names of files. See `docs/simulation.md`. The last
line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.figures import machine, print_document, print_row
from benchmarks.simulation_plots import draw_pipelines, draw_shares, draw_split, draw_stages
from gptj_dist.config import ModelConfig
from gptj_dist.operate.simulation.costs import MEASURED
from gptj_dist.operate.simulation.deployment import pipeline_spec
from gptj_dist.operate.simulation.fleet import Fleet
from gptj_dist.operate.simulation.flow import FlowFleet, FlowTimes, mean_context
from gptj_dist.operate.simulation.load import ClosedLoop, Lengths, Load, OpenLoop
from gptj_dist.operate.simulation.outcome import Outcome
from gptj_dist.planning.devices import DeviceSpec, known_device
from gptj_dist.planning.forecast import PlannedStage, Workload
from gptj_dist.planning.partition import layer_ranges, plan_partition

SIX_B = ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,), "float16")
DEEP = replace(SIX_B, num_layers=64)
MOST_STREAMS = 512
USUAL_DEVICE = "l4"
SHORT, USUAL = Lengths(128, 32), Lengths(512, 128, spread=0.8)


@dataclass(frozen=True, slots=True)
class Row:
    """A simulated case, with its settings."""

    settings: dict[str, Any]
    outcome: Outcome

    def as_json(self) -> dict[str, Any]:
        return {**self.settings, **asdict(self.outcome), "limit": self.outcome.limit}


@dataclass(frozen=True, slots=True)
class Options:
    """What all parts are given.

    Args:
        is_small: simulate a few small cases only, for a test.
    """

    device: DeviceSpec
    is_small: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default=USUAL_DEVICE, help="a device that `gptj-dist plan` knows")
    parser.add_argument("--to", type=Path, help="a directory for plots; without it none is drawn")
    parser.add_argument("--small", action="store_true", help="a few small cases only")
    args = parser.parse_args()
    options = Options(known_device(args.device), args.small)
    document: dict[str, Any] = {"machine": machine(), "device": args.device}
    files = []
    for part in args.parts:
        simulated, draw = PARTS[part]
        print_row([part, "tokens/s", "first ms", "first 99 % ms", "token ms", "token 99 % ms"])
        rows = simulated(options)
        document[part] = [row.as_json() for row in rows]
        if args.to is not None:
            args.to.mkdir(parents=True, exist_ok=True)
            file = draw(document[part], args.to)
            if args.device != USUAL_DEVICE:
                file = file.rename(file.with_stem(f"{file.stem}-{args.device}"))
            files.append(str(file))
    print_document("simulation", document | {"files": files})


def stages_of(model: ModelConfig, devices: Sequence[DeviceSpec]) -> tuple[Workload, list[PlannedStage]]:
    """A pipeline over devices, cut as if they were equal."""
    ranges = layer_ranges(plan_partition(model, len(devices)))
    stages = [PlannedStage(device, layers) for device, layers in zip(devices, ranges, strict=True)]
    return Workload(model, "float16", 2048), stages


def simulated(
    model: ModelConfig,
    devices: Sequence[DeviceSpec],
    load: Load,
    num_pipelines: int = 1,
    num_ingresses: int = 1,
    batch: int = 64,
) -> Outcome:
    """A fine simulation of equal pipelines."""
    workload, stages = stages_of(model, devices)
    specs = [pipeline_spec(workload, stages, batch)] * num_pipelines
    return Fleet(specs, num_ingresses, MEASURED).run(load)


def of_stages(options: Options) -> list[Row]:
    """Closed loops over pipelines of more and more stages."""
    device = replace(options.device, memory_bytes=1e12)  # what memory limits is for the planner
    counts = (1, 4) if options.is_small else (1, 2, 4, 8, 16, 32, 64)
    streams = (1, 8) if options.is_small else (1, 8, 32, 128, MOST_STREAMS)
    rows = []
    for num_stages in counts:
        for number in streams:
            load = ClosedLoop(number, 2 * number, SHORT)
            outcome = simulated(DEEP, [device] * num_stages, load, batch=MOST_STREAMS)
            rows.append(_row({"stages": num_stages, "streams": number}, outcome))
    return rows


def of_links(options: Options) -> list[Row]:
    """Four stages with links of more and more latency."""
    rows = []
    for number in (8,) if options.is_small else (1, 8, 32, 64):
        for latency_ms in (0.1, 10) if options.is_small else (0.1, 1, 3, 10, 30):
            device = replace(options.device, link_latency_s=latency_ms / 1e3)
            outcome = simulated(SIX_B, [device] * 4, ClosedLoop(number, 3 * number, SHORT))
            rows.append(_row({"latency_ms": latency_ms, "streams": number}, outcome))
    return rows


def of_slow(options: Options) -> list[Row]:
    """Four stages of which one is slower than the others."""
    rows = []
    for number in (8,) if options.is_small else (1, 8, 32, 64):
        for times in (1, 2) if options.is_small else (1.0, 1.25, 1.5, 2.0, 3.0):
            devices = [options.device, _slower(options.device, times), options.device, options.device]
            outcome = simulated(SIX_B, devices, ClosedLoop(number, 3 * number, SHORT))
            rows.append(_row({"times_slower": times, "streams": number}, outcome))
    return rows


def of_split(options: Options) -> list[Row]:
    """Eight devices under requests at random times, more and more. All ways take 512 requests at once."""
    rows = []
    for num_stages in (4, 8) if options.is_small else (1, 2, 4, 8):
        for rate in (2.0,) if options.is_small else (2.0, 5.0, 8.0, 11.0, 14.0, 17.0):
            load = OpenLoop(rate, 20 if options.is_small else max(250, round(30 * rate)), USUAL, seed=1)
            outcome = simulated(SIX_B, [options.device] * num_stages, load, 8 // num_stages, batch=64 * num_stages)
            rows.append(_row({"stages": num_stages, "rate": rate, "keeps_up": outcome.keeps_up}, outcome))
    return rows


def of_pipelines(options: Options) -> list[Row]:
    """Pipelines of four stages, each with the same share of the requests, coarse and for few pipelines also fine."""
    workload, stages = stages_of(SIX_B, [options.device] * 4)
    times = FlowTimes(workload, stages, MEASURED, mean_context(USUAL.prompt_tokens, USUAL.output_tokens))
    rows = []
    for num_ingresses in (1,) if options.is_small else (1, 8, 64):
        for number in (1, 4) if options.is_small else (1, 3, 10, 100, 1000):
            load = OpenLoop(RATE * number, 30 * number if options.is_small else max(150, 40 * number), USUAL, seed=1)
            outcome = FlowFleet(times, number, 64, num_ingresses, MEASURED).run(load)
            rows.append(_row({"pipelines": number, "ingresses": num_ingresses, "model": "coarse"}, outcome))
            if number <= MOST_FINE and num_ingresses == 1:
                outcome = simulated(SIX_B, [options.device] * 4, load, number)
                rows.append(_row({"pipelines": number, "ingresses": num_ingresses, "model": "fine"}, outcome))
    return rows


RATE = 2.0
"""Requests a second for each pipeline of the part `pipelines`: about 0.6 of what it can do."""

MOST_FINE = 3
"""Pipelines up to which the part `pipelines` also simulates each step."""


def _slower(device: DeviceSpec, times: float) -> DeviceSpec:
    """A device whose steps take `times` as long."""
    return replace(
        device,
        bandwidth_bytes_s=device.bandwidth_bytes_s / times,
        kv_bandwidth_bytes_s=device.kv_bandwidth_bytes_s / times,
        flops=device.flops / times,
        attention_flops=device.attention_flops / times,
        layer_overhead_s=device.layer_overhead_s * times,
    )


def _row(settings: dict[str, Any], outcome: Outcome) -> Row:
    times_s = (*outcome.first_token_s, *outcome.token_s)
    name = " ".join(f"{key} {value}" for key, value in settings.items())
    print_row([name, outcome.tokens_per_s, *(1e3 * seconds for seconds in times_s)])
    return Row(settings, outcome)


Part = tuple[Callable[[Options], list[Row]], Callable[[Sequence[dict[str, Any]], Path], Path]]

PARTS: dict[str, Part] = {
    "stages": (of_stages, draw_stages),
    "links": (of_links, lambda rows, to: draw_shares(rows, to, "links")),
    "slow": (of_slow, lambda rows, to: draw_shares(rows, to, "slow")),
    "split": (of_split, draw_split),
    "pipelines": (of_pipelines, draw_pipelines),
}

if __name__ == "__main__":
    main()
