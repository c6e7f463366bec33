"""The bodies of requests, as pydantic classes.

Checks every field, and turns the fields into `SamplingParams`. Knows no model and no tokenizer.
"""

__all__ = [
    "adapters",
    "base",
    "chat",
    "completions",
    "content",
    "embeddings",
    "grammars",
    "input_items",
    "repartition",
    "responses",
    "sampling",
    "tokens",
    "tool_use",
    "tools",
]
