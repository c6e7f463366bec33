"""What `gptj-dist top` draws: a table for each pipeline, a row for each stage. The width decides on the columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gptj_dist.serving.debug import DebugDocument, PipelineDocument, StageDocument
from gptj_dist.sizes import bytes_text

BROAD_COLUMNS = 140
WIDE_COLUMNS = 110
NORMAL_COLUMNS = 80
SMALL_COLUMNS = 60
TINY_COLUMNS = 50
"""Widths of a terminal from which a view has more columns."""

SHORT_BAR, NARROW_BAR, WIDE_BAR = 6, 10, 20
BUSY, BUBBLE, IDLE = ("━", "green"), ("╌", "yellow"), ("·", "bright_black")
"""Parts of a bar: their shapes differ where there are no colours."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table.

    Args:
        cell: its text for a stage, in a terminal of this width.
        least_width: of a terminal that has room for it, in columns of characters.
        is_number: it is aligned to the right.
    """

    name: str
    cell: Callable[[StageDocument, int], Text]
    least_width: int = 0
    is_number: bool = True


def render(document: DebugDocument, width: int) -> RenderableType:
    """All pipelines.

    Args:
        width: of the terminal, in columns.
    """
    number = len(document.pipelines)
    title = Text.assemble((document.model, "bold"), f"  {number} {'pipeline' if number == 1 else 'pipelines'}")
    if document.num_silent:
        title.append(f"  {document.num_silent} gave no answer", "yellow")
    parts: list[RenderableType] = [title, *(Text(str(pipeline), "bold yellow") for pipeline in document.down)]
    for pipeline in document.pipelines:
        parts += [Text(), *_head(pipeline), Text(), _stages(pipeline, width)]
    return Group(*parts, Text(), _legend())


def render_waiting(last: RenderableType, message: str) -> RenderableType:
    """The last view, with the reason why there is no newer one."""
    return Group(Text(f"{message}; what was seen last:", "yellow"), Text(), last)


def _head(pipeline: PipelineDocument) -> list[Text]:
    """Two lines: what goes on now, and the rates; what is down in between."""
    colour = "green" if pipeline.state == "up" else "bold yellow"
    now = Text.assemble((pipeline.name, "bold"), "  ", (pipeline.state, colour), "  ")
    now.append(f"{pipeline.num_running} running, {pipeline.num_waiting} waiting, {pipeline.num_in_flight} in flight")
    for number, what in ((pipeline.num_preemptions, "preempted"), (pipeline.num_restarts, "restarted")):
        if number:
            now.append(f", {number} {what}", "yellow")
    now.append(adapters_text([pipeline]))
    share = pipeline.num_used_blocks / max(1, pipeline.num_blocks)
    rates = Text(
        f"{pipeline.output_tokens_per_s:,.0f} tokens/s out, {pipeline.prompt_tokens_per_s:,.0f} in, "
        f"{pipeline.plans_per_s:,.0f} steps/s, KV {share:.1%} in use, "
        f"coordinator {pipeline.coordinator_share:.0%}",
        "bright_black",
    )
    if pipeline.problem is None:
        return [now, rates]
    return [now, Text(f"down for {pipeline.down_s or 0:.1f} s: {pipeline.problem}", "bold yellow"), rates]


def _stages(pipeline: PipelineDocument, width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), border_style="bright_black")
    columns = [column for column in _COLUMNS if width >= column.least_width]
    for column in columns:
        # The name of a device is the one cell that becomes shorter where the table is too wide.
        table.add_column(
            column.name, justify="right" if column.is_number else "left", no_wrap=column.cell is not _device
        )
    for stage in pipeline.stages:
        table.add_row(*(column.cell(stage, width) for column in columns))
    return table


def adapters_text(pipelines: Sequence[PipelineDocument]) -> str:
    """Continues a line: how many adapters are in use; empty if there are none."""
    num_adapters = max(pipeline.num_adapters for pipeline in pipelines)
    in_use = {name for pipeline in pipelines for name in pipeline.adapter_requests}
    return f", {len(in_use)} of {num_adapters} adapters in use" if num_adapters or in_use else ""


def _device(stage: StageDocument, width: int) -> Text:
    name = f"{stage.device} on {stage.node}" if width >= WIDE_COLUMNS else stage.device
    return Text(name, no_wrap=True, overflow="ellipsis")


def _kv(stage: StageDocument, width: int) -> Text:
    total = f" / {bytes_text(stage.kv_total_bytes)}" if width >= WIDE_COLUMNS else ""
    return Text(bytes_text(stage.kv_used_bytes) + total)


def _bar(stage: StageDocument, width: int) -> Text:
    """Busy, bubbles and rest as parts of a line, and how busy in per cent."""
    length = WIDE_BAR if width >= WIDE_COLUMNS else NARROW_BAR if width >= NORMAL_COLUMNS else SHORT_BAR
    busy = min(max(stage.busy_share or 0.0, 0.0), 1.0)
    bubble = min(max(stage.bubble_share or 0.0, 0.0), 1.0 - busy)
    num_busy = round(busy * length)
    num_bubble = round((busy + bubble) * length) - num_busy
    return Text.assemble(
        (BUSY[0] * num_busy, BUSY[1]),
        (BUBBLE[0] * num_bubble, BUBBLE[1]),
        (IDLE[0] * (length - num_busy - num_bubble), IDLE[1]),
        f" {_percent(stage.busy_share):>4}",
    )


def _legend() -> Text:
    return Text.assemble(BUSY, " busy  ", BUBBLE, " bubble: idle though work is in flight  ", IDLE, " idle")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    """Three digits, or two of a small number."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


_COLUMNS = (
    _Column("stage", lambda stage, _: Text(str(stage.stage))),
    _Column("layers", lambda stage, _: Text(f"{stage.layers[0]}-{stage.layers[1]}"), is_number=False),
    _Column("device", _device, SMALL_COLUMNS, is_number=False),
    _Column("busy", _bar, is_number=False),
    _Column("bubbles", lambda stage, _: Text(_percent(stage.bubble_share)), NORMAL_COLUMNS),
    _Column("ms/step", lambda stage, _: Text(_number(stage.step_ms))),
    _Column("queue", lambda stage, _: Text(_number(stage.queue)), NORMAL_COLUMNS),
    _Column("wait ms", lambda stage, _: Text(_number(stage.wait_ms)), WIDE_COLUMNS),
    _Column("weights", lambda stage, _: Text(f"{bytes_text(stage.weight_bytes)}, {stage.dtype}"), BROAD_COLUMNS),
    _Column("KV in use", _kv, TINY_COLUMNS),
)
