"""Commands that read and write checkpoints."""

__all__ = ["adapter", "convert", "download", "inspect", "synth", "verify"]
