"""Reads GPT-J checkpoints: where they lie, what they hold, and the tensors of one stage. Knows no layers, only names."""
