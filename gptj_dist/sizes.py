"""How sizes are divided, and how people read them. Stdlib only."""

from __future__ import annotations


def bytes_text(num_bytes: float) -> str:
    """`12.1 GB`: three digits and a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)
