"""CPU cores: how many this process may use, and cores that a stage claims for itself alone."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass

from gptj_dist.stages.container import cpu_quota

PATIENCE_S = 0.1
"""How long to try: a spare may replace a dead stage before the kernel has freed the dead one's cores. Short, since
every stage waits so long that finds no core: where there are more stages than cores, and after each of their losses."""

_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class CoreClaim:
    """Cores that belong to this process as long as it lives.

    Args:
        tokens: one bound socket for each core. The kernel closes them when the process ends, however it ends.
        allowed: all cores on which the process could run before.
    """

    cores: frozenset[int]
    tokens: tuple[socket.socket, ...]
    allowed: frozenset[int]


@dataclass(frozen=True, slots=True)
class LoneCores:
    """What a stage may use in a lone step, and in its other steps.

    Args:
        num_threads: maximum number of torch threads in a lone step.
        cores: those of the machine; empty if the stage is not bound to any.
        own: those among them to which the stage keeps in other steps.
    """

    num_threads: int
    cores: frozenset[int] = frozenset()
    own: frozenset[int] = frozenset()


def available_cores() -> int:
    """The number of cores that this process can keep busy: its affinity, limited by its control groups' CPU quota.

    A quota is rounded to the nearest number, as measured in `docs/decisions/0021-busy-machines.md`: with a quota of
    1.5 two threads decode faster than one, with 1.25 they do not. Always at least 1.
    """
    num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = cpu_quota()
    return num_cores if quota is None else max(1, min(num_cores, int(quota + 0.5)))


def claim_cores(num_cores: int) -> CoreClaim | None:
    """Claim cores that no other stage has claimed, and bind the calling thread and all that it starts to them.

    Returns:
        None if the cores cannot be claimed, and the thread may then run on any core. That is so if the stage takes
        all cores of the machine; if too few are unclaimed; on systems other than Linux; and in a Kubernetes pod or a
        container with a CPU quota, which does not see the claims of other containers.
    """
    if sys.platform != "linux" or "KUBERNETES_SERVICE_HOST" in os.environ or cpu_quota() is not None:
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
            token.bind(f"\0gptj-dist/core/{core}")  # abstract: the name holds on the whole machine and needs no file
        except OSError:
            token.close()
            continue
        tokens[core] = token
        if len(tokens) == num_cores:
            return CoreClaim(frozenset(tokens), tuple(tokens.values()), frozenset(cores))
    for token in tokens.values():
        token.close()
    return None
