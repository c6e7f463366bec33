"""Damages checkpoints in many ways, and checks what the readers do with them."""
