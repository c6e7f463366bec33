"""API keys: who may call, and how much a minute. Knows no HTTP. Only hashes of keys are kept, never the keys."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptj_dist.errors import ConfigurationError, one_line
from gptj_dist.yaml_files import read_yaml

KEY_PREFIX = "gptj-"
_PERIOD_S = 60.0

CALLER: ContextVar[str | None] = ContextVar("caller", default=None)
"""Name of the key of the call that is being answered, where several keys share the server."""

SESSION: ContextVar[str | None] = ContextVar("session", default=None)
"""What the client of the call that is being answered calls its session."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key for the server.

    Args:
        name: owner of the key; appears in logs.
        sha256: of the key, in hexadecimal. A key is long and random, so that a plain hash cannot be undone.
        requests_per_minute, tokens_per_minute: None does not limit; tokens are those of prompts and outputs.
        is_admin: may load and unload adapters, and move layers.
    """

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    is_admin: bool = False

    @property
    def is_limited(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


def hash_key(key: str) -> str:
    """The hash of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    """A key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def find_key(keys: Iterable[ApiKey], given: str) -> ApiKey | None:
    """The entry of the given key, or None. The time that this takes does not depend on the key."""
    hashed = hash_key(given)
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, hashed):
            found = key
    return found


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    admin: bool = False


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    keys: list[_Entry] = Field(min_length=1)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a YAML file: `keys`, a list of entries with the fields of `ApiKey`.

    Raises:
        ConfigurationError: the file is not there or not like that, or two entries have the same name or key.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{one_line(path)} cannot be read as a file of keys: {one_line(error)}") from error
    try:
        entries = _File.model_validate(content).keys
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = one_line(".".join(map(str, problem["loc"])))[:200]
        raise ConfigurationError(f"{path}: {place or 'the file'}: {problem['msg']}") from None
    keys = tuple(ApiKey(**entry.model_dump(exclude={"admin"}), is_admin=entry.admin) for entry in entries)
    for values in ([key.name for key in keys], [key.sha256 for key in keys]):
        if len(set(values)) < len(values):
            raise ConfigurationError(f"{path}: two keys have the same name or the same hash")
    return keys


class _Allowance:
    """An amount a minute; what is not used accumulates, up to the amount of one minute."""

    def __init__(self, per_minute: int | None, now_s: float) -> None:
        self._capacity = math.inf if per_minute is None else float(per_minute)
        self._left = self._capacity
        self._since_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` is available: 0 if it is now, infinity if it exceeds the amount of a minute."""
        if amount > self._capacity:
            return math.inf
        if self._capacity == math.inf:
            return 0.0
        self.add((now_s - self._since_s) * self._capacity / _PERIOD_S)
        self._since_s = now_s
        return max(0.0, amount - self._left) * _PERIOD_S / self._capacity

    def add(self, amount: float) -> None:
        self._left = min(self._capacity, self._left + amount)


class Quotas:
    """What every limited key has left. One instance counts for all ingresses of an application.

    Args:
        clock: seconds.
    """

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._allowances: Mapping[str, tuple[_Allowance, _Allowance]] = {
            key.name: (_Allowance(key.requests_per_minute, clock()), _Allowance(key.tokens_per_minute, clock()))
            for key in keys
        }

    def charge(self, name: str, num_tokens: int) -> float:
        """Takes one request and `num_tokens` tokens, if both are available.

        Returns:
            0 if they were taken; else the seconds until they can be taken, infinity if never.
        """
        requests, tokens = self._allowances[name]
        now_s = self._clock()
        if (wait_s := max(requests.wait_s(1, now_s), tokens.wait_s(num_tokens, now_s))) > 0:
            return wait_s
        requests.add(-1)
        tokens.add(-num_tokens)
        return 0.0

    def refund(self, name: str, num_tokens: int) -> None:
        """Refunds tokens that a request was charged for and did not use."""
        self._allowances[name][1].add(num_tokens)
