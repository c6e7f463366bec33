"""Machines that form a cluster: they join by a code, measure their links, and leave.

Knows Ray's nodes and the network between them. Places nothing and serves nothing.
"""

__all__ = ["code", "leaving", "overview", "run", "store"]
