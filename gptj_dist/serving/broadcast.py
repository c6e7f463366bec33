"""Calls all replicas of a deployment at once. A plain call of a handle reaches only one, which Serve chooses."""

from __future__ import annotations

import asyncio
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
        num_silent: number of replicas that failed or did not answer instead, such as one that has just died.
    """

    given: tuple[T, ...]
    num_silent: int


async def ask_all(
    replicas: DeploymentHandle, kind: type[T], method: str, *arguments: object, timeout_s: float = TIMEOUT_S
) -> Replies[T]:
    """Calls a method of every replica.

    Args:
        kind: class of the replies.
        timeout_s: replicas that take longer count as silent.

    Raises:
        NotReadyError: Serve does not say in time which replicas there are.
    """
    try:
        async with asyncio.timeout(timeout_s):
            # `results_async` has no results at all if one replica hangs.
            asked = await replicas.broadcast(method, *arguments)._fetch_replica_results_async()
    except DeploymentUnavailableError:  # the deployment has no replicas
        return Replies((), 0)
    except TimeoutError:
        raise NotReadyError(f"Ray Serve has not answered for {timeout_s:g} s") from None
    answers = (asyncio.wait_for(one.get_async(), timeout_s) for one in asked)
    results = await asyncio.gather(*answers, return_exceptions=True)
    failures = [result for result in results if not isinstance(result, kind)]
    for failure in failures:
        logger.warning("replica did not answer", extra=values(method=method, error=repr(failure)))
    return Replies(tuple(result for result in results if isinstance(result, kind)), len(failures))


async def ask_any(replicas: DeploymentHandle, method: str) -> bool:
    """Calls a method of every replica until one returns. A plain call of a handle would wait if there are none.

    Returns:
        Whether there are replicas.

    Raises:
        Exception: the error of one of them, if none returns.
    """
    try:
        asked = await replicas.broadcast(method)._fetch_replica_results_async()
    except DeploymentUnavailableError:
        return False
    calls = [asyncio.ensure_future(one.get_async()) for one in asked]
    try:
        for call in asyncio.as_completed(calls):
            try:
                await call
                return True
            except Exception as error:
                failure = error
    finally:
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    if not calls:
        return False
    raise failure
