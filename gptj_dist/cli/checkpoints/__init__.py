"""Commands that read and write checkpoints."""

__all__ = ["convert", "download", "inspect", "synth", "verify"]
