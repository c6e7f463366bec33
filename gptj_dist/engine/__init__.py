"""Decides what the pipeline computes next.

Knows requests, the scheduler, plans, streams and statistics. Standard library only: knows no tensors, no text and no
Ray.
"""

__all__ = [
    "async_engine",
    "beams",
    "block_pool",
    "clock",
    "drafts",
    "fairness",
    "histogram",
    "journal",
    "limits",
    "mailbox",
    "plan",
    "record",
    "request",
    "routing",
    "scheduler",
    "scheduling",
    "stats",
]
