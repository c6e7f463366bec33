"""Runs the stages of a pipeline.

In one process, or as Ray actors that `transport` connects. Knows plans and tensors. Knows no text and no HTTP.
"""

__all__ = [
    "actor",
    "actor_classes",
    "background",
    "blueprint",
    "cores",
    "departures",
    "device",
    "files",
    "group",
    "load_progress",
    "local",
    "loss",
    "on_node",
    "peer_files",
    "relocation",
    "room",
    "runner",
    "stopwatch",
    "survey",
    "trace",
]
