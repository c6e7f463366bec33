"""Charges calls to the allowances of their keys. One replica keeps the accounts for all ingresses of an application."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gptj_dist.answers.answer import Answer
from gptj_dist.answers.embedding import EmbeddingAnswer
from gptj_dist.errors import NotReadyError, TooManyRequestsError
from gptj_dist.serving.keys import ApiKey, Quotas
from gptj_dist.serving.loopback import keep_replica_on_node_address


class Accounts:
    """The deployment that keeps them; `Quotas` on the clock of its replica."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        keep_replica_on_node_address()
        self._quotas = Quotas(keys, time.monotonic)

    async def charge(self, name: str, num_tokens: int) -> float:
        """Implements `Quotas.charge`."""
        return self._quotas.charge(name, num_tokens)

    async def refund(self, name: str, num_tokens: int) -> None:
        """Implements `Quotas.refund`."""
        self._quotas.refund(name, num_tokens)


class Allowances:
    """Charges requests before they begin.

    Args:
        accounts: handle to the deployment of `Accounts`; None if no key is limited.
    """

    def __init__(self, accounts: DeploymentHandle | None) -> None:
        self._accounts = accounts

    @asynccontextmanager
    async def charged(self, key: ApiKey | None, answer: Answer | EmbeddingAnswer) -> AsyncGenerator[None, None]:
        """Charges a request with the most tokens that it may take, and refunds those that it did not take.

        Raises:
            TooManyRequestsError: the key's allowance does not have that many left.
            NotReadyError: the replica that keeps the accounts cannot be reached.
        """
        if key is None or not key.is_limited or self._accounts is None:
            yield
            return
        num_tokens = answer.num_prompt_tokens + answer.most_tokens
        await self._charge(self._accounts, key, num_tokens)
        try:
            yield
        finally:
            self._accounts.refund.remote(key.name, num_tokens - answer.num_prompt_tokens - answer.num_tokens)

    async def _charge(self, accounts: DeploymentHandle, key: ApiKey, num_tokens: int) -> None:
        try:
            wait_s = await accounts.charge.remote(key.name, num_tokens)
        except (RayError, RayServeException) as error:
            raise NotReadyError("the accounts of API keys cannot be reached") from error
        if wait_s == math.inf:
            raise TooManyRequestsError(
                f"the request may come to {num_tokens} tokens; the key {key.name!r} is allowed "
                f"{key.tokens_per_minute} a minute"
            )
        if wait_s > 0:
            limits = [(key.requests_per_minute, "requests"), (key.tokens_per_minute, "tokens")]
            allowed = " and ".join(f"{number} {what}" for number, what in limits if number is not None)
            raise TooManyRequestsError(f"the key {key.name!r} is allowed {allowed} a minute", math.ceil(wait_s))
