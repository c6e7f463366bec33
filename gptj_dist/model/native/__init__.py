"""Attention on a CPU in C, compiled on the machine that runs it. Without a compiler `model.regions` does the same."""
