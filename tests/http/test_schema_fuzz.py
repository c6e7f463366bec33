"""Whatever a client sends to what the API's own description names, the answer is one that the description promises;
and none of it is open without a key."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gptj_dist.serving.keys import hash_key
from tests.http.keys import bearer, key_of, write_keys
from tests.http.server import Server, serving
from tests.unit.test_openapi import DOCUMENT

pytestmark = pytest.mark.ray

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]
WITH_BODY = [(path, method) for path, method in OPERATIONS if "requestBody" in DOCUMENT["paths"][path][method]]
REFUSED_BY_THIS_SERVER = ("/debug/repartition",)
"""It has one stage."""
NUM_EXAMPLES = 60
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its context is short, so that no request takes long."""
    directory = tmp_path_factory.mktemp("settings")
    template = directory / "template.jinja"
    template.write_text(TEMPLATE)
    arguments = {
        "model": "demo",
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 32,
        "chat_template": str(template),
        "api_keys": write_keys(directory / "keys.yaml", ann={"admin": True}),
    }
    with serving(arguments, api_key=key_of("ann")) as server:
        yield server


@pytest.fixture(scope="module")
def schema(server: Server) -> BaseSchema:
    schema: BaseSchema = schemathesis.openapi.from_url(f"{server.base}/openapi.json", headers=bearer("ann"))
    return schema


def fuzz(schema: BaseSchema, operation: tuple[str, str], mode: GenerationMode, checks: list[Any]) -> Counter[int]:
    """Sends what the mode makes of the operation's schema, the same every time; the numbers of each status."""
    statuses: Counter[int] = Counter()
    path, method = operation

    @given(schema[path][method.upper()].as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: Case[Any]) -> None:
        response = case.call(headers=bearer("ann"), timeout=60)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=checks, headers=bearer("ann"))

    send()
    return statuses


@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_what_fits_the_description_is_answered_as_it_promises(schema: BaseSchema, operation: tuple[str, str]) -> None:
    statuses = fuzz(schema, operation, GenerationMode.POSITIVE, CHECKS)
    expected = 404 if "{" in operation[0] else 400 if operation[0] in REFUSED_BY_THIS_SERVER else 200
    assert statuses[expected] > 0


@pytest.mark.parametrize("operation", WITH_BODY, ids=" ".join)
def test_what_does_not_fit_the_description_is_refused(schema: BaseSchema, operation: tuple[str, str]) -> None:
    statuses = fuzz(schema, operation, GenerationMode.NEGATIVE, [*CHECKS, negative_data_rejection])
    assert statuses[400] > NUM_EXAMPLES / 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"prompt"',
        b"{",
        b'{"prompt": "x"} {}',
        b"\xff\xfe{}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 400 + b"}",
        b'{"prompt": "x", "seed": ' + b"9" * 9000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "x", "chat_template_kwargs": ' + b'{"a":' * 5000,
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_what_is_no_request_at_all_is_refused(server: Server, body: bytes) -> None:
    for path, _ in WITH_BODY:
        response = server.client.post(path, content=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


# Keys

OPEN_PATHS = {"/", "/docs", "/openapi.json", "/page/main.js"}
PATHS = [
    *((path.replace("{model}", "demo").replace("{name}", "main.js"), method) for path, method in OPERATIONS),
    *((path, "get") for path in ("/v1", "/no/such/path", "/v1/models/demo/", "/static/%2e%2e/metrics", "//metrics")),
    *((path, "post") for path in ("/v1/models", "/v1/embeddings", "/metrics")),
    ("/v1/models", "options"),
    ("/v1/models", "delete"),
]
BASIC = base64.b64encode(f"ann:{key_of('ann')}".encode()).decode()
STRANGERS: dict[str, dict[str, str]] = {
    "no key": {},
    "a wrong key": bearer("nobody"),
    "an empty key": {"Authorization": "Bearer"},
    "no scheme": {"Authorization": key_of("ann")},
    "another scheme": {"Authorization": f"Basic {BASIC}"},
    "a scheme of no name": {"Authorization": f"Token {key_of('ann')}"},
    "another header": {"x-api-key": key_of("ann"), "api-key": key_of("ann")},
    "the key's hash": {"Authorization": f"Bearer {hash_key(key_of('ann'))}"},
    "the key and more": {"Authorization": bearer("ann")["Authorization"] + "."},
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_nothing_but_the_documentation_is_open_without_the_key(server: Server, stranger: str) -> None:
    assert {path for path, _ in PATHS} >= {"/metrics", "/debug/pipeline", "/debug/trace", "/tokenizer_info"}
    for path, method in PATHS:
        if (path in OPEN_PATHS) and method == "get":
            continue
        response = httpx.request(method, server.base + path, headers=STRANGERS[stranger], json={"prompt": "x"})
        assert response.status_code == 401, (path, method)
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "authentication_error", None)


def test_with_the_key_everything_is(server: Server) -> None:
    for path, method in PATHS:
        response = server.client.request(method, server.base + path, json={"prompt": "x"})
        is_served = (path.replace("demo", "{model}").replace("main.js", "{name}"), method) in OPERATIONS
        assert response.status_code in ((200, 400) if is_served else (307, 404, 405)), (path, method)


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer  "])
def test_the_scheme_may_be_written_in_any_case(server: Server, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {key_of('ann')}"}
    assert httpx.get(f"{server.base}/v1/models", headers=headers).status_code == 200
