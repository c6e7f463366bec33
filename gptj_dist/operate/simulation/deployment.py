"""Ways to make pipelines of given devices: how many, of how many stages each; and what each way does under a load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from gptj_dist.config import BLOCK_SIZE_TOKENS
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.simulation.costs import MEASURED
from gptj_dist.operate.simulation.fleet import Fleet, PipelineSpec
from gptj_dist.operate.simulation.load import Load
from gptj_dist.operate.simulation.outcome import Outcome
from gptj_dist.operate.simulation.times import FormulaTimes, edges
from gptj_dist.planning.devices import DeviceSpec
from gptj_dist.planning.forecast import PlannedPipeline, PlannedStage, Workload, num_kv_tokens
from gptj_dist.planning.search import best_pipeline


@dataclass(frozen=True, slots=True)
class Deployment:
    """Pipelines of some devices each."""

    pipelines: tuple[tuple[PlannedStage, ...], ...]

    @property
    def num_stages(self) -> tuple[int, ...]:
        """The different numbers of stages of its pipelines, the most first."""
        return tuple(sorted({len(stages) for stages in self.pipelines}, reverse=True))


def deployments(workload: Workload, devices: Sequence[DeviceSpec]) -> Iterator[Deployment]:
    """The ways that have room for the model, from one pipeline to one for each device.

    Devices are dealt out in turn, fast and large ones first, so that pipelines are alike. Of two ways with the same
    number of devices in the largest pipeline, only the one with more pipelines is taken.
    """
    ordered = sorted(devices, key=_speed, reverse=True)
    for count in sorted({len(devices) // size for size in range(1, len(devices) + 1)}):
        with suppress(ConfigurationError):  # a share of the devices does not hold the model
            yield Deployment(tuple(best_pipeline(workload, ordered[index::count]) for index in range(count)))


def _speed(device: DeviceSpec) -> tuple[float, float, float]:
    return device.bandwidth_bytes_s, device.flops, device.memory_bytes


def pipeline_spec(workload: Workload, stages: PlannedPipeline, max_batch_size: int) -> PipelineSpec:
    """What is simulated of a planned pipeline. No prompt begins like another, so nothing is kept for later ones."""
    config = SchedulerConfig(
        num_stages=len(stages),
        num_blocks=num_kv_tokens(workload, stages) // BLOCK_SIZE_TOKENS,
        block_size=BLOCK_SIZE_TOKENS,
        max_batch_size=max_batch_size,
        eos_token_ids=(),
        keeps_prefixes=False,
    )
    return PipelineSpec(config, FormulaTimes(workload, stages), edges(workload, stages))


def simulate(
    workload: Workload, deployment: Deployment, load: Load, max_batch_size: int, num_ingresses: int = 1
) -> Outcome:
    """What a deployment does under a load, with coordinators and ingresses as they were measured."""
    specs = [pipeline_spec(workload, stages, max_batch_size) for stages in deployment.pipelines]
    return Fleet(specs, num_ingresses, MEASURED).run(load)
