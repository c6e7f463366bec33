"""The settings of a launch, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_dist.errors import ConfigurationError
from gptj_dist.serving.http.listener import Address
from gptj_dist.serving.settings import AppConfig
from gptj_dist.serving.sockets import is_loopback


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run and where.

    Args:
        scaling: Serve's `num_replicas` or `autoscaling_config`.
        listen: address for HTTP; ignored by a cluster that runs Serve already.
        address: the Ray cluster to join; None starts a local one.
        trace: the file for a trace of what each stage computes; None writes none.
        name: the Serve application's; a cluster may have several.
        route_prefix: prefix of the paths of its endpoints.
        api_key: one of the application's keys, for the launcher's own requests; None if it has none.
        is_open: allows other machines to reach it without a key.
        start_timeout_s: how long a local Ray may take to start.
        wait_nodes: nodes that the cluster must have before anything is placed; None waits for none.
        wait_nodes_s: how long to wait for them.

    Raises:
        ConfigurationError: the settings contradict each other, or other machines could reach it without a key.
    """

    app: AppConfig
    scaling: Mapping[str, Any]
    listen: Address
    address: str | None
    trace: Path | None
    name: str
    route_prefix: str
    api_key: str | None
    is_open: bool
    start_timeout_s: float
    wait_nodes: int | None
    wait_nodes_s: float

    def __post_init__(self) -> None:
        if not self.route_prefix.startswith("/"):
            raise ConfigurationError(f"--route-prefix must begin with a slash, got {self.route_prefix!r}")
        if self.address is None and self.route_prefix != "/":
            raise ConfigurationError("--route-prefix is for several models on one cluster; give its --address too")
        if self.address is not None and self.listen.tls_cert is not None:
            raise ConfigurationError(
                "on a cluster Serve's proxies take HTTP, and they know no TLS: put a proxy in front (docs/security.md)"
            )
        if self.start_timeout_s <= 0:
            raise ConfigurationError(f"--start-timeout-s must be positive, got {self.start_timeout_s:g}")
        if self.wait_nodes is not None and self.address is None:
            raise ConfigurationError("--wait-nodes waits for nodes of a cluster; give its --address, or `auto`")
        self.require_key_at(self.listen.host)

    def require_key_at(self, host: str) -> None:
        """Raises ConfigurationError if other machines could reach the application at `host` without a key."""
        if not (self.app.api_keys or self.is_open or is_loopback(host)):
            raise ConfigurationError(
                f"{host} is open to other machines, and there is no API key: give --api-key or --api-keys, or "
                "--insecure if only trusted machines can reach it"
            )
