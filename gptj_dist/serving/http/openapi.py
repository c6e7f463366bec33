"""The endpoints as an OpenAPI document, made of the schemas that check requests and of their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import get_args

from pydantic.json_schema import models_json_schema

import gptj_dist
from gptj_dist.answers.schema.base import Body
from gptj_dist.json_types import JsonObject
from gptj_dist.params import SamplingParams
from gptj_dist.serving.http.endpoint import Endpoint

_REFERENCE = "#/components/schemas/{model}"
_ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n     +.*)*)", re.MULTILINE)

HINT = "Accepted with any value, without effect on the text."
UNSERVED = "Not supported: only null, false, empty, zero or the default is accepted."

_ERROR: JsonObject = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@cache
def openapi_document(endpoints: tuple[Endpoint, ...], root_path: str) -> JsonObject:
    """The endpoints in OpenAPI 3.1; made once, because it takes tens of milliseconds.

    Args:
        root_path: prefix of every path.
    """
    bodies = [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    paths: JsonObject = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path}", "}")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gptj-dist", "version": gptj_dist.__version__},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": _schemas(bodies) | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(endpoint: Endpoint) -> JsonObject:
    error = {"description": "An error.", "content": {"application/json": {"schema": _reference("Error")}}}
    done: JsonObject = {"description": "Done.", "content": {media: {} for media in endpoint.media}}
    operation: JsonObject = {
        "operationId": endpoint.handler.__name__,
        "summary": endpoint.summary,
        "responses": {"200": done, "default": error},
    }
    if endpoint.body is not None:
        schema = _reference(endpoint.body.__name__)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    parameters = [(name, "path") for name in re.findall(r"{(\w+)", endpoint.path)]
    if endpoint.header is not None:
        parameters.append((endpoint.header, "header"))
    if parameters:
        operation["parameters"] = [
            {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}
            for name, place in parameters
        ]
    return operation


def _schemas(bodies: Iterable[type[Body]]) -> JsonObject:
    """Every body and its parts, with what their fields mean; then the fields that have no effect."""
    kinds = list(dict.fromkeys(_with_parts(bodies)))
    _, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REFERENCE)
    schemas: JsonObject = definitions["$defs"]
    for kind in kinds:
        schema = schemas[kind.__name__]
        meanings = {**_meanings(SamplingParams)}
        for base in reversed(kind.__mro__):
            meanings |= _meanings(base)
        required = schema.get("required", ())
        fields: JsonObject = {}
        for name, field in sorted(schema["properties"].items(), key=lambda item: item[0] not in required):
            field.pop("title", None)
            described = field | ({"description": meanings[name]} if name in meanings else {})
            fields[name] = described if name in required else _or_null(described)
        for name in sorted(kind.hints.difference(fields)):
            fields[name] = {"description": HINT}
        for name in sorted(kind.unserved.keys() - fields):
            default = kind.unserved[name]
            nothing: list[object] = [None, False, 0, "", [], {}]
            forms = [
                {"enum": [*([] if default is None else [default]), *nothing]},
                {"type": "object", "additionalProperties": {"enum": nothing}},
            ]
            fields[name] = {"anyOf": forms, "description": UNSERVED}
        schema["properties"] = fields
        schema["description"] = (inspect.getdoc(kind) or "").partition("\n")[0]
    return schemas


def _with_parts(kinds: Iterable[type[Body]]) -> Iterator[type[Body]]:
    for kind in kinds:
        yield kind
        for field in kind.model_fields.values():
            yield from _with_parts(_bodies_in(field.annotation))


def _bodies_in(annotation: object) -> Iterator[type[Body]]:
    if isinstance(annotation, type) and issubclass(annotation, Body):
        yield annotation
    for argument in get_args(annotation):
        yield from _bodies_in(argument)


def _or_null(field: JsonObject) -> JsonObject:
    """A field that may also be null, which stands for the default."""
    outer: JsonObject = {name: field.pop(name) for name in ("description", "default") if name in field}
    alternatives = field.get("anyOf", [field])
    if {"type": "null"} not in alternatives:
        alternatives = [*alternatives, {"type": "null"}]
    return {"anyOf": alternatives, **outer}


@cache
def _meanings(kind: type) -> Mapping[str, str]:
    """The descriptions of arguments in the docstring of a class."""
    _, _, arguments = (inspect.getdoc(kind) or "").partition("Args:\n")
    arguments = arguments.partition("\nRaises:")[0]
    return {name: " ".join(text.split()) for names, text in _ARGUMENT.findall(arguments) for name in names.split(", ")}


def _reference(name: str) -> JsonObject:
    return {"$ref": _REFERENCE.format(model=name)}
