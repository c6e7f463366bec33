"""The ingress over HTTP: endpoints, middleware, the listener and the OpenAPI document."""
