"""Simulates pipelines, ingresses and their load on a virtual clock, with the real scheduler and router.

Knows the time of a step by the planner's formula or by a line, and the processor time that coordinator and ingress
take. Computes no model and starts no process.
"""

__all__ = ["choice", "clock", "costs", "deployment", "fleet", "flow", "load", "outcome", "pipeline", "stages", "times"]
