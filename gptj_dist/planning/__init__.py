"""Predicts speed and chooses cuts.

Arithmetic on the figures of devices. Standard library only: touches no device.
"""

__all__ = ["cost", "devices", "fit", "forecast", "links", "moves", "partition", "placed", "rebalance", "search"]
