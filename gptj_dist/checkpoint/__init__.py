"""Reads and writes GPT-J checkpoints.

Knows where a model lies, what its files hold, and which bytes belong to one stage. Knows names and shapes of tensors,
but not what layers compute.
"""

__all__ = [
    "adapter_formats",
    "adapter_loader",
    "adapters",
    "convert",
    "delta",
    "files",
    "hub",
    "index",
    "inspection",
    "loader",
    "local_copy",
    "manifest",
    "partial",
    "pieces",
    "synthetic",
]
