"""Gives each stage of a machine CPU cores of its own, so that none waits for a core that another one computes on."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass

PATIENCE_S = 1.0
"""A stage that replaces a dead one may be there before the dead one's cores are free."""

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class CoreClaim:
    """Cores that belong to this process as long as it lives.

    Args:
        tokens: bound sockets, one a core; the kernel closes them whatever the process dies of.
    """

    cores: frozenset[int]
    tokens: tuple[socket.socket, ...]


def claim_cores(num_cores: int) -> CoreClaim | None:
    """Claims cores that no other stage has, and keeps this thread and those that it starts on them.

    Returns:
        None where that is not to be had: all cores are wanted, too few are left, or this is not Linux; or in a
        Kubernetes pod, which sees neither the claims of other pods nor, mostly, cores of its own. The thread may then
        run anywhere, as before.
    """
    if sys.platform != "linux" or "KUBERNETES_SERVICE_HOST" in os.environ:
        return None
    allowed = sorted(os.sched_getaffinity(0))
    if num_cores >= len(allowed):
        return None
    deadline = time.monotonic() + PATIENCE_S
    while (claim := _try_to_claim(allowed, num_cores)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if claim is not None:
        os.sched_setaffinity(0, claim.cores)
    return claim


def _try_to_claim(cores: list[int], num_cores: int) -> CoreClaim | None:
    tokens: dict[int, socket.socket] = {}
    for core in cores:
        token = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            token.bind(f"\0gptj-dist/core/{core}")  # a name of the whole machine, without a file
        except OSError:
            token.close()
            continue
        tokens[core] = token
        if len(tokens) == num_cores:
            return CoreClaim(frozenset(tokens), tuple(tokens.values()))
    for token in tokens.values():
        token.close()
    return None
