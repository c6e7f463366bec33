"""GPT-J on one device.

Knows the layers of a stage, their KV cache, attention, and sampling. Knows no requests, no files and no Ray.
"""

__all__ = [
    "adapters",
    "arithmetic",
    "attention",
    "block_cache",
    "block_tables",
    "gptj",
    "graphs",
    "inputs",
    "kv_cache",
    "layers",
    "logprobs",
    "quantized",
    "sampler",
    "weight_changes",
]
