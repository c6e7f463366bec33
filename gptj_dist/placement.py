"""Where the stages of a pipeline go: settings as people write them, and what a stage asks of Ray. Stdlib only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from gptj_dist.errors import ConfigurationError, excerpt

DeviceKind = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", DeviceKind]

NODE_ID_LABEL = "ray.io/node-id"
"""The label that Ray gives each node."""

ANY_NODE = "any"

ADDRESS_SHARE = 0.001
"""Share of the resource `node:ADDRESS`, of which each node has 1: what asks for it is placed on that node."""

_LABEL = re.compile(r"[A-Za-z0-9][\w./-]*=[A-Za-z0-9][\w.-]*")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]*[.:][0-9A-Fa-f:.]*")


@dataclass(frozen=True, slots=True)
class StageResources:
    """What one stage asks of Ray.

    Args:
        node: an entry of `PipelineConfig.stage_nodes`.
    """

    device: DeviceKind
    cpus: float
    gpus: float
    node: str = ANY_NODE

    @property
    def node_id(self) -> str | None:
        """Ray's name of the node that the planner chose; None if it chose none.

        Another node may take the stage when that one is gone, as no node ever has its name again.
        """
        key, _, value = self.node.partition("=")
        return value if key == NODE_ID_LABEL else None

    @property
    def bundle(self) -> dict[str, float]:
        """Ray resources by name; an address is one of them."""
        resources = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        is_address = self.node != ANY_NODE and "=" not in self.node
        return resources | ({f"node:{self.node}": ADDRESS_SHARE} if is_address else {})

    @property
    def labels(self) -> dict[str, str]:
        """The label that its node must have, if any."""
        key, equals, value = self.node.partition("=")
        return {key: value} if equals and key != NODE_ID_LABEL else {}


def parse_device(text: str) -> tuple[DeviceChoice, ...]:
    """`auto`, `cpu` or `cuda` for all stages, or one of them for each stage: `cpu,cuda`.

    Raises:
        ConfigurationError: there is something else.
    """
    known = ("auto", *get_args(DeviceKind))
    names = tuple(text.split(","))
    if not set(names) <= set(known):
        raise ConfigurationError(
            f"device must be one of {', '.join(known)}, or one of them for each stage, such as cpu,cuda; "
            f"got {excerpt(text)}"
        )
    return cast(tuple[DeviceChoice, ...], names)


def check_nodes(nodes: Sequence[str]) -> None:
    """Refuses entries of `stage_nodes` that are neither an address, a label nor `any`.

    Raises:
        ConfigurationError: names the entry.
    """
    for node in nodes:
        if node != ANY_NODE and not _LABEL.fullmatch(node) and not _ADDRESS.fullmatch(node):
            raise ConfigurationError(
                f"stage_nodes takes addresses such as 10.0.0.2, labels such as zone=b, or 'any'; got {excerpt(node)}"
            )
