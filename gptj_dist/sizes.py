"""How sizes are spelled for people. Stdlib only."""

from __future__ import annotations


def bytes_text(num_bytes: float) -> str:
    """`12.1 GB`: three digits and a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
