"""Commands about the machines of a cluster."""

__all__ = ["join", "leave", "nodes", "up"]
