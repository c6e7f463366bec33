"""The description of the API says what the endpoints take."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from gptj_dist.answers.schema.base import Body, is_neutral
from gptj_dist.serving.http.endpoints import Endpoints
from gptj_dist.serving.http.openapi import openapi_document
from gptj_dist.serving.http.pages import docs_page


def make_endpoints(keeper: Any = None) -> Endpoints:
    nothing: Any = None  # the table says what there is; it calls nobody
    return Endpoints(("demo",), nothing, nothing, nothing, nothing, nothing, keeper)


ENDPOINTS = make_endpoints().table()


DOCUMENT = openapi_document(ENDPOINTS, "/a")
SCHEMAS = DOCUMENT["components"]["schemas"]
BODIES = [endpoint.body for endpoint in ENDPOINTS if endpoint.body is not None]


def test_document_and_page_are_made_once() -> None:
    served = make_endpoints()
    assert openapi_document(served.table(), "/b") is openapi_document(served.table(), "/b")
    assert docs_page(served.table(), "/b") is docs_page(served.table(), "/b")


def test_every_endpoint_is_there_and_takes_what_it_checks() -> None:
    assert DOCUMENT["servers"] == [{"url": "/a"}]
    for endpoint in ENDPOINTS:
        operation = DOCUMENT["paths"][endpoint.path.replace(":path", "")][endpoint.method.lower()]
        content = operation.get("requestBody", {"content": {}})["content"]
        references = [schema["schema"]["$ref"].rpartition("/")[2] for schema in content.values()]
        assert references == ([] if endpoint.body is None else [endpoint.body.__name__])


def test_the_rest_of_a_stream_is_there_only_if_streams_are_kept() -> None:
    document = openapi_document(make_endpoints(keeper="any").table(), "/c")
    [path] = document["paths"].keys() - DOCUMENT["paths"].keys()
    parameters = document["paths"][path]["get"]["parameters"]
    assert path == "/v1/streams/{id}"
    assert [(one["name"], one["in"], one["required"]) for one in parameters] == [
        ("id", "path", True),
        ("Last-Event-ID", "header", False),
    ]


@pytest.mark.parametrize("body", BODIES)
def test_a_schema_has_every_field_with_and_without_effect(body: type[Body]) -> None:
    schema = SCHEMAS[body.__name__]
    assert set(schema["properties"]) == {*body.model_fields, *body.hints, *body.unserved}
    assert schema["additionalProperties"] is False
    for name in set(body.unserved) - set(body.model_fields):
        for value in schema["properties"][name]["anyOf"][0]["enum"]:
            assert is_neutral(value, body.unserved[name])
            assert is_neutral({"key": value}) == (not value)


@pytest.mark.parametrize("name", sorted(set(SCHEMAS) - {"Error"}))
def test_every_field_of_every_schema_says_what_it_means(name: str) -> None:
    assert [field for field, value in SCHEMAS[name]["properties"].items() if not value.get("description")] == []


def test_all_references_lead_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    names = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names == set(SCHEMAS)


class Words(HTMLParser):
    """The texts of a page, and whether it fetches anything."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str | None] = []

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value for name, value in attrs if name == "src"]


def test_the_page_names_every_path_and_field_and_needs_nothing_from_elsewhere() -> None:
    page = Words()
    page.feed(docs_page(ENDPOINTS, "/a"))
    assert set(DOCUMENT["paths"]) <= set(page.words)
    assert {name for body in BODIES for name in body.model_fields} <= set(page.words)
    assert page.sources == []
