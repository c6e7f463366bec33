"""Formats tables, most of all of stages."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gptj_dist.config import LayerRange
from gptj_dist.quantization import weights_text
from gptj_dist.sizes import bytes_text
from gptj_dist.stages.blueprint import StageReport


def open_table(*texts: str, numbers: Sequence[str]) -> Table:
    """A table without rows: columns of texts, then of numbers, which are aligned to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def stage_table(reports: Sequence[StageReport], num_kv_tokens: int | None) -> Table:
    """One line a stage: layers, device, memory, KV cache.

    Args:
        num_kv_tokens: of the whole pipeline; None leaves the columns of the KV cache empty.
    """
    table = open_table("stage", "layers", "device", numbers=("weights", "KV cache", "KV tokens"))
    for report in reports:
        table.add_row(
            str(report.layers.stage),
            layers_text(report.layers),
            f"{report.device.name}, {weights_text(report.quantized, report.dtype)}",
            bytes_text(report.weight_bytes),
            "-" if num_kv_tokens is None else bytes_text(report.kv_bytes_per_token * num_kv_tokens),
            "-" if num_kv_tokens is None else f"{num_kv_tokens:,}",
        )
    return table


def layers_text(layers: LayerRange) -> str:
    """`embed + 0-13 (14)`: the stage's layers and their number, with the embedding or the head."""
    parts = ["embed"] * layers.is_first + [f"{layers.start}-{layers.stop - 1} ({layers.num_layers})"]
    return " + ".join(parts + ["head"] * layers.is_last)
