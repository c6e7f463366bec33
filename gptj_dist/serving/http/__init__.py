"""The ingress over HTTP.

Knows endpoints, middleware, limits, the listener and the OpenAPI document. Knows requests and answers only through
`answers`.
"""

__all__ = ["admission", "application", "endpoints", "gate", "listener"]
