"""`gptj-dist serve` at a terminal: starts or joins Ray, deploys, reports, drains, stops. Knows no HTTP endpoint."""

__all__ = ["cluster", "leftovers", "run", "session_room", "settings"]
