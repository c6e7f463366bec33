"""`gptj-dist plan --check`: the planner's formula against this machine."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import PipelineConfig
from gptj_dist.operate.calibration import CheckedModel, PipelineCheck, check_pipeline
from gptj_dist.operate.tables import open_table
from gptj_dist.planning.cost import Chunks
from gptj_dist.stages.blueprint import choose_dtype
from gptj_dist.stages.device import describe_device, open_device

NUM_STAGES = (1, 2)
TOLERANCE = 0.25
QUIET_CORES = 0.2
"""What other processes may use of the CPU before we say that the machine was not quiet."""


def print_check(config: PipelineConfig) -> bool:
    """Checks the model cut into 1 and 2 stages, prints a table of each, and says whether all steps are within 25 %.

    Raises:
        ConfigurationError: the checkpoint or this machine is not suitable.
        StageFailedError: a process died.
    """
    model = read_model_config(resolve_model(config.model, config.revision))
    dtype = choose_dtype(config, model, [describe_device(open_device("cpu"))])
    checked = CheckedModel(config.model, config.revision, model, dtype)
    console = Console(markup=False, emoji=False)
    console.print(
        f"{config.model} in {dtype} on this machine's CPU. Step times are predicted from those of models of other "
        "shapes, and then measured; each round does both."
    )
    checks = []
    for num_stages in NUM_STAGES:
        with console.status("") as status:
            found = check_pipeline(checked, num_stages, note=lambda text: status.update(f"{text} ..."))
        console.print(_table(found, num_stages))
        console.print(_figures(found), highlight=False)
        checks.append(found)
    return _conclude(console, checks)


def _conclude(console: Console, checks: list[PipelineCheck]) -> bool:
    errors = [abs(step.ratio - 1) for check in checks for step in check.steps]
    num_off = sum(error > TOLERANCE for error in errors)
    others_cores = max(check.others_cores for check in checks)
    console.print(
        f"{len(errors) - num_off} of {len(errors)} predictions are within {TOLERANCE:.0%} of what was measured; the "
        f"worst is off by {max(errors):.0%}."
    )
    if num_off and others_cores > QUIET_CORES:
        console.print(
            f"The machine was not quiet: other processes used up to {others_cores:.1f} of its cores. "
            "Try again when it is."
        )
    return num_off == 0


def _table(check: PipelineCheck, num_stages: int) -> Table:
    table = open_table(f"stage of {num_stages}", "step", numbers=("predicted ms", "measured ms", "ratio"))
    for step in sorted(check.steps, key=lambda step: step.layers.stage):
        table.add_row(
            str(step.layers.stage),
            _case_text(step.case),
            f"{step.predicted_s * 1e3:.2f}",
            f"{step.measured_s * 1e3:.2f}",
            f"{step.ratio:.2f}" + " !" * (abs(step.ratio - 1) > TOLERANCE),
        )
    return table


def _case_text(case: Chunks) -> str:
    if case.num_tokens > 1:
        return f"prompt chunk of {case.num_tokens} tokens"
    requests = f"{case.num_requests} request{'s' * (case.num_requests > 1)}"
    return f"decode, {requests} at {case.context_tokens - 1} tokens"


def _figures(check: PipelineCheck) -> str:
    device = check.devices[0]
    return (
        f"Stage 0's share, fitted: {device.bandwidth_bytes_s / 1e9:.0f} GB/s of weights, {device.flops / 1e9:.0f} "
        f"GFLOP/s, {device.layer_overhead_s * 1e6:.0f} us a layer."
    )
