"""Memory that the compiled library reads at the speed of memory. For CPUs."""

from __future__ import annotations

import mmap
import sys
import threading
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
SHARED_BYTES = 32 << 20
"""Of address space, which small pieces share. The system provides a page when it is first written."""


def memory_of(num_bytes: int) -> Tensor:
    """Memory uint8 [num_bytes], at a multiple of 64 bytes, in pages of 2 MB if there are any.

    A decode step reads all weights and all keys and values once. In pages of 4 KB it waits for their addresses for a
    sixth of its time or more. Less than a page shares pages, which are free when all that lies in them is.
    """
    return _huge_pages(num_bytes) if num_bytes >= HUGE_PAGE_BYTES else _shared_pages().take(num_bytes)


class SharedPages:
    """Hands out pieces of memory, one behind the other. For all threads."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """Memory uint8 [num_bytes], at a multiple of 64 bytes."""
        with self._lock:
            if len(self._rest) < num_bytes:
                self._rest = _huge_pages(SHARED_BYTES)
            taken, self._rest = self._rest[:num_bytes], self._rest[-(-num_bytes // 64) * 64 :]
            return taken


@cache
def _shared_pages() -> SharedPages:
    return SharedPages()


def _huge_pages(num_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    elements = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -elements.data_ptr() % HUGE_PAGE_BYTES
    return elements[begin : begin + num_bytes]
