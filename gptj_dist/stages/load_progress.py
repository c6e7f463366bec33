"""How far a stage is with its weights, as `serve` shows it. Quick to import: no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """What a stage does before it can compute.

    Args:
        activity: such as `fetching model.safetensors` or `9/14 layers`.
        num_bytes: of the model's files that have been read, or fetched.
        all_bytes: that will be; 0 while that is not known.
        source: the node that they are fetched from; empty if they are read.
    """

    activity: str
    num_bytes: int = 0
    all_bytes: int = 0
    source: str = ""

    def __str__(self) -> str:
        return self.activity
