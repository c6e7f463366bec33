"""The OpenMP team of a thread that computes: its size, its cores, and its sleep while there is no work. For CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch

from gptj_dist.model.native.library import WaitFunction

T = TypeVar("T")


class Team:
    """The OpenMP threads of the calling thread, which is one of them. Call it from that thread alone."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._placed: tuple[int, tuple[int, ...]] | None = None

    def resize(self, num_threads: int, cores: tuple[int, ...]) -> None:
        """Sets the number of threads of the operators that follow, and binds the threads to cores.

        As many threads as cores have one core each, the calling thread the first. Fewer may run on all of them.

        Args:
            cores: empty leaves the threads where they are.
        """
        torch.set_num_threads(num_threads)
        if cores and self._placed != (num_threads, cores):
            num_each = 1 if num_threads == len(cores) else len(cores)
            self._library.place_team((ctypes.c_int32 * len(cores))(*cores), len(cores), num_each)
            self._placed = num_threads, cores

    def wait_for(self, receive: Callable[[], T]) -> T:
        """The result of `receive`, during which the other threads sleep. Raises what `receive` raises."""
        received: list[T] = []
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                received.append(receive())
            except BaseException as error:  # none may cross the C function
                errors.append(error)

        self._library.wait_as_team(WaitFunction(wait))
        if errors:
            raise errors[0]
        return received[0]
