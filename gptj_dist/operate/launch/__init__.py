"""`gptj-dist serve` at a terminal: starts or joins Ray, deploys, reports, drains, stops. Knows no HTTP endpoint."""

__all__ = [
    "cluster", "environment", "leftovers", "local_ray", "processes", "run", "session_room", "settings", "signals",
    "terminal", "tokens",
]  # fmt: skip
