"""The list of endpoints for people: a page that needs nothing from elsewhere, and no script."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment

from gptj_dist.json_types import JsonObject
from gptj_dist.serving.http.endpoint import Endpoint
from gptj_dist.serving.http.openapi import HINT, UNSERVED, openapi_document


@cache
def docs_page(endpoints: tuple[Endpoint, ...], root_path: str) -> str:
    """The OpenAPI document as a page; made once, as the document."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["words"] = _type_in_words
    environment.tests["served"] = lambda field: field.get("description") not in (HINT, UNSERVED)
    template = environment.from_string(Path(__file__).with_name("docs.html.jinja").read_text("utf-8"))
    return template.render(document=openapi_document(endpoints, root_path), others=(HINT, UNSERVED))


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
