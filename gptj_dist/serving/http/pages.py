"""The pages for people: the front page, and the list of endpoints. They need nothing from elsewhere, and no script."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from jinja2 import Environment

from gptj_dist.json_types import JsonObject
from gptj_dist.serving.http.endpoint import Endpoint
from gptj_dist.serving.http.openapi import HINT, UNSERVED, openapi_document

EXAMPLE = {"prompt": "The state of the Union is", "max_tokens": 40, "stream": True}
MAX_BASE_CHARS = 200
"""A longer address, which the client itself sent, is not shown."""


def front_page(names: tuple[str, ...], state: str, base: str, root_path: str, needs_key: bool) -> str:
    """The page at `/`.

    Args:
        names: of the model; none for a caller who has not shown a key.
        state: whether the server is ready, in words.
        base: the address by which the client reached the server.
        root_path: the prefix of all paths.
        needs_key: calls need a key.
    """
    base = base if len(base) <= MAX_BASE_CHARS else ""
    key = ' -H "Authorization: Bearer $GPTJ_API_KEY"' if needs_key else ""
    command = f"curl -N {base}/v1/completions{key} -d '{json.dumps(EXAMPLE)}'"
    return _render("front", names=names, state=state, root=root_path, command=command)


@cache
def docs_page(endpoints: tuple[Endpoint, ...], root_path: str) -> str:
    """The OpenAPI document as a page; made once, as the document."""
    return _render("docs", document=openapi_document(endpoints, root_path), others=(HINT, UNSERVED))


def _render(name: str, **variables: object) -> str:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["words"] = _type_in_words
    environment.tests["served"] = lambda field: field.get("description") not in (HINT, UNSERVED)
    return environment.from_string(Path(__file__).with_name(f"{name}.html.jinja").read_text("utf-8")).render(variables)


def _type_in_words(schema: JsonObject) -> str:
    """Such as `number or null`, for people."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        types = [_type_in_words(one) for one in schema["anyOf"] if one != {"type": "null"}]
        return " or ".join(dict.fromkeys(types)) or "null"
    if "oneOf" in schema:
        return " or ".join(map(_type_in_words, schema["oneOf"]))
    if "enum" in schema:
        return " or ".join("null" if value is None else str(value) for value in schema["enum"])
    if schema.get("type") == "array":
        items = _type_in_words(schema.get("items", {}))
        return f"list of {items.replace('list of', 'lists of') if items.startswith('list') else items + 's'}"
    return str(schema.get("const", schema.get("type", "anything")))
