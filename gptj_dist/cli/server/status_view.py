"""What `gptj-dist status` prints: a line for each thing, and a table with a row a stage. Fits 80 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gptj_dist.cli.server.server_state import ServerState
from gptj_dist.cli.server.top_view import WIDE_COLUMNS
from gptj_dist.serving.debug import PipelineDocument, StageDocument
from gptj_dist.sizes import bytes_text


def render(state: ServerState, width: int) -> RenderableType:
    """A line for each thing, and a table of the stages.

    Args:
        width: of the terminal, in columns.
    """
    ready = Text("ready", "green") if state.problem is None else Text(f"not ready: {state.problem}", "bold yellow")
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_row("server", Text.assemble((state.base, "bold"), "  ", ready))
    rows.add_row("version", Text(state.version or "not told"))
    rows.add_row("models", Text(", ".join(state.models) or "none"))
    if state.debug is None or not state.debug.pipelines:
        return rows
    rows.add_row("load", _load(state.debug.pipelines))
    if number := state.debug.num_silent:
        noun = "pipeline" if number == 1 else "pipelines"
        rows.add_row("", Text(f"{number} more {noun} gave no answer", "yellow"))
    return Group(rows, Text(), _stages(state.debug.pipelines, width >= WIDE_COLUMNS))


def _load(pipelines: tuple[PipelineDocument, ...]) -> Text:
    """That of all pipelines together."""
    num_blocks = sum(p.num_blocks for p in pipelines)
    share = sum(p.num_used_blocks for p in pipelines) / max(1, num_blocks)
    return Text(
        f"{sum(p.num_running for p in pipelines):,} running, {sum(p.num_waiting for p in pipelines):,} waiting, "
        f"{sum(p.output_tokens_per_s for p in pipelines):,.0f} tokens/s out, "
        f"{sum(p.prompt_tokens_per_s for p in pipelines):,.0f} in, KV {share:.1%} in use"
    )


def _stages(pipelines: tuple[PipelineDocument, ...], is_wide: bool) -> RenderableType:
    """A row a stage; the pipeline's name and state stand before its first."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), border_style="bright_black")
    for column in ("pipeline", "state", "stage", "layers"):
        table.add_column(column, no_wrap=True)
    table.add_column("device")  # the one that gives way where the terminal is narrow
    for column in ("dtype", *(["node"] if is_wide else [])):
        table.add_column(column, no_wrap=True)
    table.add_column("KV in use", justify="right", no_wrap=True)
    for pipeline in pipelines:
        name = (Text(pipeline.name), Text(pipeline.state, "green" if pipeline.state == "up" else "bold yellow"))
        for stage in pipeline.stages:
            table.add_row(*(name if stage.stage == 0 else ("", "")), *_cells(stage, is_wide))
    return table


def _cells(stage: StageDocument, is_wide: bool) -> list[Text]:
    kv = f"{bytes_text(stage.kv_used_bytes)} of {bytes_text(stage.kv_total_bytes)}"
    device = Text(stage.device, no_wrap=True, overflow="ellipsis")
    others = [stage.dtype, *([stage.node] if is_wide else []), kv]
    return [Text(str(stage.stage)), Text(f"{stage.layers[0]}-{stage.layers[1]}"), device, *map(Text, others)]
