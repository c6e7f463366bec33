"""Commands that start, watch and plan a server."""

__all__ = ["doctor", "key", "plan", "repartition", "serve", "status", "stop", "top"]
