"""Shares a pipeline between keys, so that none holds up another for long. Knows no scheduler and no clock.

The order is that of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): requests have places on a line of
tokens, and the lowest place is next. A request's place is where the one before it of the same key ends, but not before
the place that is next now. So keys with many requests take turns, weighted by their tokens; one that comes back after a
pause is next, and has no credit for the pause. Requests of one key, and those without keys, stay in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptj_dist.engine.request import Request


@dataclass(slots=True)
class _Share:
    """Where the requests of a key end, and the place of the last one."""

    end: int = 0
    last: int = 0


class FairShares:
    """Gives requests their places."""

    def __init__(self) -> None:
        self._shares: dict[str | None, _Share] = {}

    def enter(self, request: Request, place_now: int) -> None:
        """Sets the request's place.

        Args:
            place_now: the place that is next, or was last if no request waits.
        """
        share = self._shares.setdefault(request.key, _Share())
        begin = max(place_now, share.end)
        share.end = begin + _num_asked(request)
        request.place = share.last = max(begin, share.last)

    def leave(self, request: Request) -> None:
        """Gives back the tokens that the request asked for and did not use: later ones of its key come sooner."""
        num_left = (request.params.max_tokens - request.num_output_tokens) * request.params.num_beams
        self._shares[request.key].end -= num_left if request.num_output_tokens else _num_asked(request)


def _num_asked(request: Request) -> int:
    """Tokens that it may take, those of a prompt only for the first request that has it."""
    num_shared = 0 if request.prompt.first is request else request.prompt.num_shareable
    return len(request.prompt_ids) - num_shared + request.params.max_tokens * request.params.num_beams


def has_room(num_of_keys: Mapping[str | None, int], key: str | None, most: int) -> bool:
    """Whether a queue takes another request: until it is full, and then those of keys with less than an equal share.

    Args:
        num_of_keys: requests in the queue by key; more than 0 each.
    """
    return sum(num_of_keys.values()) < most or num_of_keys.get(key, 0) < most // len({*num_of_keys, key})
