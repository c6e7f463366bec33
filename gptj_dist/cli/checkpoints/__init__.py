"""Commands that read and write checkpoints."""

__all__ = ["adapter", "convert", "download", "drift", "inspect", "synth", "verify"]
