"""The ingress over HTTP: endpoints, middleware, the listener, the pages and the OpenAPI document."""
