"""Reads and writes GPT-J checkpoints.

Knows where a model lies, what its files hold, and which bytes belong to one stage. Knows names and shapes of tensors,
but not what layers compute.
"""

__all__ = ["convert", "files", "hub", "index", "inspection", "loader", "partial", "synthetic"]
