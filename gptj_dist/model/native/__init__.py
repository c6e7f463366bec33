"""C code for CPUs, compiled where it runs.

Knows attention and products of matrices. Knows no layers.
"""

__all__ = ["attention", "library", "low_rank", "product"]
