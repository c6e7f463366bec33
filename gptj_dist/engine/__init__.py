"""Decides what the pipeline computes next. Stdlib only: knows no tensors, no text, no Ray."""
