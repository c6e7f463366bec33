"""The layouts in which other tools keep quantised weights, a module each.

A layout says of which tensors of a file a matrix consists, and what their bits mean in the terms of
`model.quantized.QuantizedWeight`.
"""

__all__ = ["base", "detect", "ggml_file"]
