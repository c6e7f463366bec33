"""Attention on a CPU in C, compiled on the machine that runs it. Where there is no compiler, `model.attention` serves."""
