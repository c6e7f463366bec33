"""Makes JSON schemas of the kinds that JSONSchemaBench has: calls of functions, records, nested data, configurations.

`python -m benchmarks.structured_output` has a model fill them in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any]

WORDS = (
    *("name", "age", "city", "kind", "size", "unit", "date", "value", "count", "total", "price", "label", "color"),
    *("owner", "state", "code", "level", "title", "note", "user", "ship", "whale", "port", "crew", "depth", "speed"),
)  # fmt: skip
PATTERNS = ("^[a-z]{2,6}$", "^[A-Z]{3}-[0-9]{3}$", "^(0|[1-9][0-9]?)$", "^v[0-9]+(\\.[0-9]{1,2})?$", "^#[0-9a-f]{6}$")
FORMATS = ("date", "time", "date-time", "ipv4", "uuid")


class Maker:
    """Makes parts of schemas by a random choice.

    Args:
        draw: the source of all choices.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def scalar(self) -> Schema:
        """A text, a number, one of some values, a truth value or null."""
        draw = self._draw
        low = draw.randrange(-50, 50)
        return draw.choice((
            {"type": "string", "maxLength": draw.randrange(4, 20)},
            {"type": "string", "minLength": 1, "maxLength": draw.randrange(3, 12)},
            {"type": "string", "pattern": draw.choice(PATTERNS)},
            {"type": "string", "format": draw.choice(FORMATS)},
            {"enum": draw.sample(WORDS, draw.randrange(1, 6))},
            {"enum": [1, "one", None, True, [1], {"a": 1}][: draw.randrange(2, 7)]},
            {"const": draw.choice([*WORDS, 7, False])},
            {"type": "integer", "minimum": low, "maximum": low + draw.randrange(100)},
            {"type": "number", "exclusiveMinimum": low, "maximum": low + 1 + draw.randrange(50)},
            {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": draw.choice((2, 5, 10))},
            {"type": "boolean"},
            {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        ))  # fmt: skip

    def record(self, depth: int = 0) -> Schema:
        """An object with some properties, of which some are required."""
        draw = self._draw
        names = draw.sample(WORDS, draw.randrange(1, 5))
        properties = {name: self.part(depth - 1) for name in names}
        required = draw.sample(names, draw.randrange(len(names) + 1))
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def array(self, depth: int = 0) -> Schema:
        """A list of some parts of a kind."""
        least = self._draw.randrange(3)
        most = least + self._draw.randrange(3)
        return {"type": "array", "items": self.part(depth - 1), "minItems": least, "maxItems": most}

    def part(self, depth: int) -> Schema:
        """Anything; no record or list if the depth is negative."""
        if depth < 0 or self._draw.random() < 0.5:
            return self.scalar()
        return self._draw.choice((self.record, self.array))(depth)

    def function(self) -> Schema:
        """A call of a function, as tools are described."""
        arguments = self.record()
        for schema in arguments["properties"].values():
            schema["description"] = "What the function takes."
        properties = {"name": {"const": self._draw.choice(WORDS)}, "arguments": arguments}
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    def alternatives(self) -> Schema:
        """One of several records or scalars."""
        return {"anyOf": [self.record(), self.scalar(), self.array()][self._draw.randrange(2) :]}

    def combined(self) -> Schema:
        """Two rules at once."""
        first, second = self.record(), self.record()
        for schema in (first, second):
            del schema["additionalProperties"]
        return {"allOf": [first, second]} if not shares_names(first, second) else first | {"title": "one"}

    def references(self) -> Schema:
        """Definitions that are used in several places."""
        uses = {name: {"$ref": "#/$defs/part"} for name in self._draw.sample(WORDS, 3)}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$defs": {"part": self.part(1)},
            "type": "object",
            "properties": uses,
            "required": list(uses)[:2],
            "additionalProperties": False,
        }

    def tree(self) -> Schema:
        """A definition that contains itself."""
        children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}
        node = {"type": "object", "properties": {"value": self.scalar(), "children": children}, "required": ["value"]}
        return {"$defs": {"node": node | {"additionalProperties": False}}, "$ref": "#/$defs/node"}

    def tuple_(self) -> Schema:
        """A list whose places have rules of their own."""
        places = [self.scalar() for _ in range(self._draw.randrange(1, 4))]
        return {"type": "array", "prefixItems": places, "items": False, "minItems": len(places)}

    def map_(self) -> Schema:
        """An object whose keys are not known."""
        values = self.scalar()
        if self._draw.random() < 0.5:
            return {"type": "object", "patternProperties": {"^[a-z]{1,5}$": values}, "additionalProperties": False}
        return {"type": "object", "additionalProperties": values}


KINDS: Mapping[str, Callable[[Maker], Schema]] = {
    "scalar": Maker.scalar,
    "record": Maker.record,
    "nested": lambda maker: maker.record(2),
    "array": lambda maker: maker.array(1),
    "function": Maker.function,
    "alternatives": Maker.alternatives,
    "combined": Maker.combined,
    "references": Maker.references,
    "tree": Maker.tree,
    "tuple": Maker.tuple_,
    "map": Maker.map_,
}


def schema(number: int) -> Schema:
    """The schema of this number: the same each time. Numbers go through all kinds in turn."""
    kinds = list(KINDS.values())
    return kinds[number % len(kinds)](Maker(random.Random(number)))


def shares_names(one: Schema, other: Schema) -> bool:
    """Whether two records have a property of the same name."""
    return not one["properties"].keys().isdisjoint(other["properties"])
