"""Checks whether serving would work.

Gathers facts of machines and clusters, and turns them into findings with cures. Starts no server.
"""

__all__ = ["cluster", "facts", "findings", "fit", "start", "survey", "text"]
