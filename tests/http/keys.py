"""API keys of servers under test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gptj_dist.serving.keys import hash_key


def write_keys(path: Path, **limits: dict[str, Any]) -> str:
    """Writes a file for `api_keys`; returns its path.

    Args:
        limits: limits and rights of each key by its name; the key itself is `key_of` the name.
    """
    entries = [{"name": name, "sha256": hash_key(key_of(name)), **limit} for name, limit in limits.items()]
    path.write_text(yaml.safe_dump({"keys": entries}))
    return str(path)


def key_of(name: str) -> str:
    """The key with this name in tests."""
    return f"secret of {name}"


def bearer(name: str) -> dict[str, str]:
    """The header with the key of this name."""
    return {"Authorization": f"Bearer {key_of(name)}"}
