"""C code for CPUs, compiled where it runs.

Knows attention, products of matrices, and the threads that compute them. Knows no layers.
"""

__all__ = ["attention", "library", "low_rank", "product", "team"]
