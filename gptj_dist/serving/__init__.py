"""The Ray Serve application: HTTP ingress and pipeline deployments."""
