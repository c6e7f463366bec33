"""Commands that start, watch and plan a server."""

__all__ = ["doctor", "key", "plan", "serve", "status", "stop", "top"]
