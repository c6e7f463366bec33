"""The Ray Serve application.

Knows the deployments (ingress, pipeline, accounts, streams), how tokens travel between them, settings, keys and
metrics. Knows nothing of the person who runs it: that is `operate`.
"""

__all__ = [
    "adapters",
    "app",
    "auto_plan",
    "broadcast",
    "debug",
    "http",
    "keys",
    "pipeline",
    "settings",
    "sizing",
    "sockets",
]
