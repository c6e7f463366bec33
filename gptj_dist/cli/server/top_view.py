"""What `gptj-dist top` draws: a table a pipeline, a row a stage. Fits 80 columns; 110 and more say more."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gptj_dist.serving.debug import DebugDocument, PipelineDocument, StageDocument
from gptj_dist.sizes import bytes_text

WIDE_COLUMNS = 110
NARROW_BAR, WIDE_BAR = 10, 20
BUSY, BUBBLE, IDLE = ("━", "green"), ("╌", "yellow"), ("·", "bright_black")
"""Parts of a bar: told apart by their shape where there are no colours."""


def render(document: DebugDocument, width: int) -> RenderableType:
    """All pipelines.

    Args:
        width: of the terminal, in columns.
    """
    parts = [part for pipeline in document.pipelines for part in _pipeline(pipeline, width >= WIDE_COLUMNS)]
    number = len(document.pipelines)
    title = Text.assemble((document.model, "bold"), f"  {number} {'pipeline' if number == 1 else 'pipelines'}")
    if document.num_silent:
        title.append(f"  {document.num_silent} gave no answer", "yellow")
    return Group(title, *parts, Text(), _legend())


def render_waiting(last: RenderableType, message: str) -> RenderableType:
    """The last view, with a word on why it is not a newer one."""
    return Group(Text(f"{message}; what was seen last:", "yellow"), Text(), last)


def _pipeline(pipeline: PipelineDocument, is_wide: bool) -> list[RenderableType]:
    return [Text(), *_head(pipeline), Text(), _stages(pipeline, is_wide)]


def _head(pipeline: PipelineDocument) -> list[Text]:
    """Two lines: what goes on now, and the rates."""
    colour = "green" if pipeline.state == "up" else "bold yellow"
    now = Text.assemble((pipeline.name, "bold"), "  ", (pipeline.state, colour), "  ")
    now.append(f"{pipeline.num_running} running, {pipeline.num_waiting} waiting, {pipeline.num_in_flight} in flight")
    for number, what in ((pipeline.num_preemptions, "preempted"), (pipeline.num_restarts, "restarted")):
        if number:
            now.append(f", {number} {what}", "yellow")
    share = pipeline.num_used_blocks / pipeline.num_blocks
    rates = Text(
        f"{pipeline.output_tokens_per_s:,.0f} tokens/s out, {pipeline.prompt_tokens_per_s:,.0f} in, "
        f"{pipeline.plans_per_s:,.0f} steps/s, KV {share:.1%} in use, "
        f"coordinator {pipeline.coordinator_share:.0%}",
        "bright_black",
    )
    return [now, rates]


def _stages(pipeline: PipelineDocument, is_wide: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), border_style="bright_black")
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    table.add_column("device")  # the one that gives way where the terminal is narrow
    table.add_column("busy", no_wrap=True)
    for column in ("bubbles", "ms/step", "queue", *(["wait ms"] if is_wide else []), "KV in use"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in pipeline.stages:
        table.add_row(*_cells(stage, is_wide))
    return table


def _cells(stage: StageDocument, is_wide: bool) -> list[Text]:
    kv = bytes_text(stage.kv_used_bytes)
    name = f"{stage.device} on {stage.node}" if is_wide else stage.device
    device = Text(name, no_wrap=True, overflow="ellipsis")
    numbers = [_percent(stage.bubble_share), _number(stage.step_ms), _number(stage.queue)]
    if is_wide:
        numbers.append(_number(stage.wait_ms))
        kv += f" / {bytes_text(stage.kv_total_bytes)}"
    place = [Text(str(stage.stage)), Text(f"{stage.layers[0]}-{stage.layers[1]}"), device]
    return [*place, _bar(stage, WIDE_BAR if is_wide else NARROW_BAR), *map(Text, numbers), Text(kv)]


def _bar(stage: StageDocument, width: int) -> Text:
    """Busy, bubbles and rest as parts of a line, and how busy in per cent."""
    busy, bubble = stage.busy_share or 0.0, stage.bubble_share or 0.0
    num_busy = round(busy * width)
    num_bubble = round((busy + bubble) * width) - num_busy
    return Text.assemble(
        (BUSY[0] * num_busy, BUSY[1]),
        (BUBBLE[0] * num_bubble, BUBBLE[1]),
        (IDLE[0] * (width - num_busy - num_bubble), IDLE[1]),
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
