"""Memory that the compiled library reads at the speed of memory. For CPUs."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def memory_of(num_bytes: int) -> Tensor:
    """Memory uint8 [num_bytes], at a multiple of 64 bytes. In pages of 2 MB if it fills one and there are any.

    A decode step reads all weights and all keys and values once. In pages of 4 KB it waits for their addresses for a
    sixth of its time or more. The system provides a page when it is first written.
    """
    if num_bytes < HUGE_PAGE_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    elements = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -elements.data_ptr() % HUGE_PAGE_BYTES
    return elements[begin : begin + num_bytes]
