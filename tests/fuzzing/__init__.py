"""Breaks checkpoints in every way that one can think of, and watches what reading them does."""
