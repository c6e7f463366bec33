"""The body of `POST /debug/repartition`."""

from __future__ import annotations

from gptj_dist.answers.schema.base import Body


class RepartitionRequest(Body):
    """A new cut, for pipelines that run.

    Args:
        layers: of each stage, first to last. The number of stages stays.
    """

    layers: list[int]
