"""Makes a JSON schema stricter where llguidance alone would allow what validators refuse.

Refuses schemas that take long to compile by what they hold, before anything is compiled.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Literal

MAX_PROPERTIES = 512
"""Of one object in a schema: the time to compile them grows with the square of their number."""

MAX_WORK_US = 100_000
"""What a schema may take to compile, by the estimates below: microseconds."""

PART_US = 50
"""Of an object in the schema, which a property has, too."""

KEYWORDS_US = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), 250),
    "format": 700,
    "pattern": 400,
}
VALUE_US = 4
"""Of a value of an `enum`, and of each remainder of a `multipleOf`."""

MAX_MULTIPLE = 30_000
"""The least common multiple of all `multipleOf`: a number of which several must hold has that many remainders."""

DATA = frozenset(("const", "default", "enum", "examples"))
"""Keywords whose values are no schemas."""

NAMES = frozenset(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"))
"""Keywords whose values are schemas by names, which may be any."""

Place = Literal["schema", "names", "data"]

_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = f"({_LEAP_YEAR}-02-29|[0-9]{{4}}-((0[13-9]|1[0-2])-[0-9]{{2}}|02-([01][0-9]|2[0-8])))"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5]"

PATTERNS = {"date": f"^{_DATE}", "time": f"^{_TIME}", "date-time": f"^{_DATE}T{_TIME}"}
"""Of formats: without February 29 in other years, and without leap seconds."""


def exact_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Changes a schema in place and returns it.

    Raises:
        ValueError: it would take too long to compile.
    """
    parts: list[tuple[Any, Place]] = [(schema, "schema")]
    work_us, multiples = 0, {1}
    while parts:
        part, place = parts.pop()
        if isinstance(part, dict):
            if len(part) > MAX_PROPERTIES:
                raise ValueError(f"an object has {len(part)} properties, at most {MAX_PROPERTIES} are taken")
            work_us += _work_us(part)
            multiples.add(_remainders(part))
            if work_us > MAX_WORK_US:
                raise ValueError("the schema is too large: it has too many properties, patterns, formats or bounds")
            parts += [(value, _place(keyword, place)) for keyword, value in part.items()]
            if place == "schema":
                _make_exact(part)
        elif isinstance(part, list):
            parts += [(one, place) for one in part]
    if max(multiples) > MAX_MULTIPLE or math.lcm(*multiples) > MAX_MULTIPLE:
        raise ValueError(f"numbers of multipleOf must have a common multiple of at most {MAX_MULTIPLE}")
    return schema


def _place(keyword: str, place: Place) -> Place:
    """Where the value of a keyword or of a name is. A reference may lead to data, so they have limits, too."""
    if place == "schema":
        return "names" if keyword in NAMES else "data" if keyword in DATA else "schema"
    return "schema" if place == "names" else "data"


def _make_exact(schema: dict[str, Any]) -> None:
    form = schema.get("format")
    if isinstance(form, str) and form in PATTERNS:
        others = schema.get("allOf", [])
        schema["allOf"] = [*(others if isinstance(others, list) else [others]), {"pattern": PATTERNS[form]}]


def _work_us(part: dict[str, Any]) -> int:
    values = part.get("enum")
    num_values = len(values) if isinstance(values, list) else 0
    keywords_us = sum(KEYWORDS_US[keyword] for keyword in part.keys() & KEYWORDS_US)
    return PART_US + keywords_us + VALUE_US * (num_values + _remainders(part))


def _remainders(part: dict[str, Any]) -> int:
    """The `multipleOf`, in units of its last decimal."""
    multiple = part.get("multipleOf")
    if not isinstance(multiple, int | float) or multiple <= 0:
        return 1
    if not multiple <= MAX_MULTIPLE:  # it may be NaN
        return MAX_MULTIPLE + 1
    number = Decimal(str(multiple)).normalize()
    _, _, exponent = number.as_tuple()
    assert isinstance(exponent, int), "it is finite"
    return int(number.scaleb(max(0, -exponent)))
