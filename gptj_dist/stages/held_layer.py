"""A layer beside those that a stage computes."""

from __future__ import annotations

from dataclasses import dataclass

from gptj_dist.model.block_tables import LayerKV
from gptj_dist.model.layers import Layer


@dataclass(frozen=True, slots=True)
class HeldLayer:
    """A layer that the stage does not compute any more, or not yet: its weights, and its keys and values."""

    layer: Layer
    kv: LayerKV
