"""Commands that make text."""

__all__ = ["batch", "chat", "complete", "generate"]
