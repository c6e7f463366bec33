"""Reads GPT-J checkpoints: where they lie, what they hold, and the tensors of one stage. Knows names, not layers."""
