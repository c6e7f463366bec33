"""What `gptj-dist status` prints: a line for each subject, a table of the stages, and the last loss of each stage.

The width decides which columns the table has.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gptj_dist.cli.server.server_state import ServerState
from gptj_dist.cli.server.top_view import NORMAL_COLUMNS, SMALL_COLUMNS, WIDE_COLUMNS, adapters_text
from gptj_dist.serving.debug import PipelineDocument, StageDocument
from gptj_dist.sizes import bytes_text

_OPTIONAL_COLUMNS = {"device": SMALL_COLUMNS, "dtype": NORMAL_COLUMNS, "weights": WIDE_COLUMNS, "node": WIDE_COLUMNS}
"""Columns of the table of stages, and the width of the terminal from which it has each."""


def render(state: ServerState, width: int) -> RenderableType:
    """A line for each subject, a table of the stages, and the losses.

    Args:
        width: of the terminal, in columns.
    """
    ready = Text("ready", "green") if state.problem is None else Text(f"not ready: {state.problem}", "bold yellow")
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_row("server", Text.assemble((state.base, "bold"), "  ", ready))
    rows.add_row("version", Text(state.version or "not reported"))
    rows.add_row("models", Text(", ".join(state.models) or "none"))
    for pipeline in () if state.debug is None else state.debug.down:
        rows.add_row("", Text(str(pipeline), "yellow"))
    if state.debug is None or not state.debug.pipelines:
        return rows
    rows.add_row("load", _load(state.debug.pipelines))
    if number := state.debug.num_silent:
        noun = "pipeline" if number == 1 else "pipelines"
        rows.add_row("", Text(f"{number} more {noun} gave no answer", "yellow"))
    losses = [text for pipeline in state.debug.pipelines for text in _losses(pipeline)]
    return Group(rows, Text(), _stages(state.debug.pipelines, width), *([Text(), *losses] if losses else []))


def _load(pipelines: tuple[PipelineDocument, ...]) -> Text:
    """That of all pipelines together."""
    num_blocks = sum(p.num_blocks for p in pipelines)
    share = sum(p.num_used_blocks for p in pipelines) / max(1, num_blocks)
    return Text(
        f"{sum(p.num_running for p in pipelines):,} running, {sum(p.num_waiting for p in pipelines):,} waiting, "
        f"{sum(p.output_tokens_per_s for p in pipelines):,.0f} tokens/s out, "
        f"{sum(p.prompt_tokens_per_s for p in pipelines):,.0f} in, KV {share:.1%} in use"
        f"{adapters_text(pipelines)}"
    )


def _stages(pipelines: tuple[PipelineDocument, ...], width: int) -> RenderableType:
    """A row for each stage; the pipeline's name and state are in the row of its first."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), border_style="bright_black")
    for column in ("pipeline", "state", "stage", "layers"):
        table.add_column(column, no_wrap=True)
    for column, least_width in _OPTIONAL_COLUMNS.items():
        if width >= least_width:
            # The name of a device is the one cell that becomes shorter where the table is too wide.
            table.add_column(column, no_wrap=column != "device")
    table.add_column("KV in use", justify="right", no_wrap=True)
    for pipeline in pipelines:
        name = (Text(pipeline.name), Text(pipeline.state, "green" if pipeline.state == "up" else "bold yellow"))
        for stage in pipeline.stages:
            table.add_row(*(name if stage.stage == 0 else ("", "")), *_cells(stage, width))
    return table


def _cells(stage: StageDocument, width: int) -> Iterator[Text]:
    yield Text(str(stage.stage))
    yield Text(f"{stage.layers[0]}-{stage.layers[1]}")
    optional = {
        "device": Text(stage.device, no_wrap=True, overflow="ellipsis"),
        "dtype": Text(stage.dtype),
        "weights": Text(bytes_text(stage.weight_bytes)),
        "node": Text(stage.node),
    }
    yield from (optional[column] for column, least_width in _OPTIONAL_COLUMNS.items() if width >= least_width)
    total = f" of {bytes_text(stage.kv_total_bytes)}" if width >= NORMAL_COLUMNS else ""
    yield Text(bytes_text(stage.kv_used_bytes) + total)


def _losses(pipeline: PipelineDocument) -> Iterator[Text]:
    """The last loss of each stage that has died."""
    last = {loss.stage: loss for loss in pipeline.losses}
    for _, loss in sorted(last.items()):
        back = "not back yet" if loss.back_after_s is None else f"back after {loss.back_after_s:.1f} s"
        lost = "lost" if loss.lost_at is None else f"lost {loss.lost_at}"
        yield Text(f"{lost}: {pipeline.name}, {back}: {loss}", "yellow")
