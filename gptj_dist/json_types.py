"""The type of a parsed JSON object. Stdlib only."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
