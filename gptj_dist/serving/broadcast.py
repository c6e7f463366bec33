"""Calls all replicas of a deployment at once. A plain call of a handle reaches only one, which Serve chooses."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Generic, TypeVar

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from gptj_dist.errors import NotReadyError
from gptj_dist.logs import values

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Replies(Generic[T]):
    """The replies of all replicas.

    Args:
        num_silent: number of replicas that failed instead, such as one whose coordinator has just died.
    """

    given: tuple[T, ...]
    num_silent: int


async def ask_all(replicas: DeploymentHandle, kind: type[T], method: str, *arguments: object) -> Replies[T]:
    """Calls a method of every replica.

    Args:
        kind: class of the replies.

    Raises:
        NotReadyError: one of them neither answers nor fails.
    """
    try:
        response = replicas.broadcast(method, *arguments)
        results = await response.results_async(timeout_s=TIMEOUT_S, return_exceptions=True)
    except DeploymentUnavailableError:  # the deployment has no replicas
        return Replies((), 0)
    except TimeoutError:
        raise NotReadyError(f"a replica has not answered for {TIMEOUT_S:.0f} s") from None
    failures = [result for result in results if not isinstance(result, kind)]
    for failure in failures:
        logger.warning("replica did not answer", extra=values(method=method, error=repr(failure)))
    return Replies(tuple(result for result in results if isinstance(result, kind)), len(failures))
