"""Makes a JSON schema stricter where llguidance alone would allow what validators refuse."""

from __future__ import annotations

from typing import Any

MAX_PROPERTIES = 512
"""Of one object in a schema: the time to compile them grows with the square of their number."""

DATA = frozenset(("const", "default", "enum", "examples"))
"""Keywords whose values are no schemas."""

_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = f"({_LEAP_YEAR}-02-29|[0-9]{{4}}-((0[13-9]|1[0-2])-[0-9]{{2}}|02-([01][0-9]|2[0-8])))"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5]"

PATTERNS = {"date": f"^{_DATE}", "time": f"^{_TIME}", "date-time": f"^{_DATE}T{_TIME}"}
"""Of formats: without February 29 in other years, and without leap seconds."""


def exact_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Changes a schema in place and returns it.

    Raises:
        ValueError: an object has too many properties.
    """
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if len(part) > MAX_PROPERTIES:
                raise ValueError(f"an object has {len(part)} properties, at most {MAX_PROPERTIES} are taken")
            parts += [value for keyword, value in part.items() if keyword not in DATA]
            form = part.get("format")
            if isinstance(form, str) and form in PATTERNS:
                others = part.get("allOf", [])
                part["allOf"] = [*(others if isinstance(others, list) else [others]), {"pattern": PATTERNS[form]}]
        elif isinstance(part, list):
            parts += part
    return schema
