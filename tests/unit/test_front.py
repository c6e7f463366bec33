"""The HTTP application at a real socket: pages, bodies of every encoding, paths that are not served, old clients."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from gptj_dist.answers.request_limits import KEEP_ALIVE_S, MAX_BODY_BYTES
from gptj_dist.errors import ConfigurationError, NotReadyError, StageFailedError
from gptj_dist.serving.http.connection import ConnectionLimits
from gptj_dist.serving.http.listener import Address
from gptj_dist.serving.http.page_files import FILES, page_file
from gptj_dist.serving.keys import ApiKey, hash_key
from tests.front_app import FrontApp, front_app

BODY = json.dumps({"prompt": "The état", "max_tokens": 2}).encode()
PACKED = gzip.compress(BODY, mtime=0)
KEYS = (ApiKey("ann", hash_key("secret")),)
WITH_KEY = {"Authorization": "Bearer secret"}


class Page(HTMLParser):
    """The words and the links of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.links: list[str | None] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("href", "src")]


def get(path: str, headers: dict[str, str] | None = None, **application: Any) -> Any:
    """The response to a GET, and that it is whole."""

    async def run() -> Any:
        async with front_app(**application) as front:
            return await front.client.get(path, headers=headers)

    return asyncio.run(run())


def post(body: bytes, **headers: str) -> Any:
    """The response to a completion."""

    async def run() -> Any:
        async with front_app() as front:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await front.client.post("/v1/completions", content=body, headers=named)

    return asyncio.run(run())


class TestPages:
    def test_the_page_and_its_parts_are_served_and_ask_for_nothing_from_elsewhere(self) -> None:
        response = get("/")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/html")
        links = [link for link in Page(response.text).links if link not in ("/", "data:,")]
        assert {"docs", "openapi.json", "v1/models", "page/main.js", "page/style.css"} <= set(links)
        assert not any(link is None or ":" in link or link.startswith("/") for link in links)
        for name in FILES:
            part = get(f"/page/{name}")
            assert part.status_code == 200
            assert "'none'" in part.headers["content-security-policy"]
            assert "unsafe" not in part.headers["content-security-policy"]
            assert "http" not in part.text.replace("http-equiv", "")

    def test_the_page_has_at_most_100_kb(self) -> None:
        assert sum(len(page_file(name).content) for name in (*FILES, "index.html")) <= 100_000

    def test_a_browser_that_has_a_part_gets_a_304(self) -> None:
        for path in ("/", "/page/main.js"):
            etag = get(path).headers["etag"]
            again = get(path, {"if-none-match": f'"other", W/{etag}'})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
            assert get(path, {"if-none-match": '"other"'}).status_code == 200

    def test_below_a_prefix_the_page_asks_there(self) -> None:
        assert b'<base href="/gptj/">' in page_file("index.html", "/gptj").content
        assert page_file("index.html", "/gptj").etag != page_file("index.html").etag
        assert b'<base href="/&quot;&lt;/">' in page_file("index.html", '/"<').content

    @pytest.mark.parametrize("name", ["other.js", "index.html", "..%2fpages.py", "%2e%2e/pages.py", ""])
    def test_other_files_are_not_served(self, name: str) -> None:
        response = get(f"/page/{name}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"

    def test_health_is_200_while_no_pipeline_is_ready_and_503_once_no_tokens_can_be_received(self) -> None:
        assert get("/health", unready=NotReadyError("the model is still loading")).status_code == 200
        response = get("/health", unhealthy=StageFailedError("the ingress can no longer receive tokens: closed"))
        assert (response.status_code, "can no longer receive" in response.text) == (503, True)

    def test_with_keys_a_browser_opens_the_pages_that_say_no_more_than_the_documentation(self) -> None:
        for path in ("/", "/docs", "/openapi.json", *(f"/page/{name}" for name in FILES)):
            response = get(path, keys=KEYS, names=("hidden-name",))
            assert response.status_code == 200
            assert "hidden-name" not in response.text

    @pytest.mark.parametrize(
        "path", ["/v1/models", "/tokenizer_info", "/metrics", "/ready", "/docs/", "/docsx", "/page/x.js"]
    )
    def test_with_keys_nothing_else_is_open(self, path: str) -> None:
        assert get(path, keys=KEYS).status_code == 401

    def test_with_keys_the_pages_are_not_open_to_other_methods(self) -> None:
        async def run() -> list[int]:
            async with front_app(keys=KEYS) as front:
                return [(await front.client.request(method, "/")).status_code for method in ("POST", "DELETE", "HEAD")]

        assert asyncio.run(run()) == [401, 401, 200]


class TestBodies:
    @pytest.mark.parametrize(
        ("encoding", "pack"),
        [
            ("gzip", gzip.compress),
            ("x-gzip", gzip.compress),
            ("GZIP", gzip.compress),
            ("deflate", zlib.compress),
            ("deflate", lambda body: zlib.compress(body, wbits=-15)),
            ("identity", bytes),
        ],
    )
    def test_a_compressed_body_is_the_same_request(self, encoding: str, pack: Callable[[bytes], bytes]) -> None:
        response = post(pack(BODY), content_encoding=encoding)
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == post(BODY).json()["choices"]

    def test_a_byte_order_mark_before_a_body_is_no_part_of_it(self) -> None:
        assert post(b"\xef\xbb\xbf" + BODY).json()["choices"] == post(BODY).json()["choices"]

    @pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 1000])
    def test_an_encoding_that_is_not_read_is_named(self, encoding: str) -> None:
        response = post(BODY, content_encoding=encoding)
        message = response.json()["error"]["message"]
        assert response.status_code == 415
        assert encoding[:10] in message
        assert "gzip" in message
        assert len(message) < 200

    @pytest.mark.parametrize("body", [BODY, PACKED[:-9], PACKED + b"x", b"", b"\x1f\x8b"])
    def test_a_body_that_is_not_what_its_encoding_says_is_a_400_that_says_so(self, body: bytes) -> None:
        response = post(body, content_encoding="gzip")
        assert response.status_code == 400
        assert "gzip" in response.json()["error"]["message"]

    def test_a_small_body_that_unpacks_into_a_large_one_is_a_413(self) -> None:
        packed = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
        assert len(packed) < 10_000
        assert post(packed, content_encoding="gzip").status_code == 413
        assert post(gzip.compress(BODY.ljust(MAX_BODY_BYTES)), content_encoding="gzip").status_code == 200

    @pytest.mark.parametrize(
        ("body", "form"),
        [
            (PACKED, "gzip"),
            (BODY.decode().encode("utf-16"), "UTF-16"),
            (BODY.decode().encode("utf-16-le"), "UTF-16"),
            (BODY.decode().encode("utf-32-be"), "UTF-32"),
            (b"PK\x03\x04", "zip"),
        ],
    )
    def test_a_body_in_a_form_that_is_not_json_in_utf_8_is_named(self, body: bytes, form: str) -> None:
        response = post(body)
        assert response.status_code == 400
        assert form in response.json()["error"]["message"]


class TestWhatIsNotServed:
    @pytest.mark.parametrize(
        ("path", "hint"),
        [
            ("/v1/messages", "use /v1/chat/completions or /v1/responses"),
            ("/v1/messages/count_tokens", "use /v1/chat/completions or /v1/responses"),
            ("/chat/completions", "did you mean /v1/chat/completions?"),
            ("/v1/completion", "did you mean /v1/completions?"),
            ("/v1/audio/speech", "GET /docs lists all paths"),
        ],
    )
    def test_a_404_says_what_to_use(self, path: str, hint: str) -> None:
        response = get(path)
        assert response.status_code == 404
        assert hint in response.json()["error"]["message"]

    def test_no_refusal_repeats_much_of_what_was_sent(self) -> None:
        async def run(front: FrontApp) -> list[Any]:
            long = "x" * 10_000
            completion = {"prompt": "x", "max_tokens": 1}
            bodies = (
                {"model": long},
                {long: 1},
                {"user": [long]},
                {"stop": [long] * 20},
                {"stop_token_ids": [10**4000]},
                {"prompt": [10**4000]},
                {"max_tokens": 10**4000},
                {"seed": -(10**4000)},
                {"logit_bias": {long: 1}},
                {"logit_bias": {"1": 10**300}},
                {"stream_options": {long: 1}},
            )
            answers = [await front.client.get(f"/{long}"), await front.client.get(f"/v1/models/{long}")]
            return answers + [await front.client.post("/v1/completions", json=completion | body) for body in bodies]

        async def scenario() -> list[Any]:
            async with front_app() as front:
                return await run(front)

        for response in asyncio.run(scenario()):
            assert 400 <= response.status_code < 500, response.text
            error = response.json()["error"]
            assert len(error["message"]) < 350
            assert error["message"].count("x") + error["message"].count("0") <= 200 + len("exceed max_tokens context")
            assert len(error["param"] or "") <= 200


class TestOldClients:
    @staticmethod
    def raw(request: bytes) -> bytes:
        """All bytes that a server sends before it closes the connection."""

        async def run() -> bytes:
            async with front_app() as front:
                reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
                writer.write(request)
                received = await reader.read()
                writer.close()
                return received

        return asyncio.run(run())

    @staticmethod
    def completion(version: str, stream: bool) -> bytes:
        body = json.dumps({"prompt": "x", "max_tokens": 3, "stream": stream}).encode()
        headers = f"Host: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        return f"POST /v1/completions HTTP/{version}\r\n{headers}".encode() + body

    def test_http_1_0_gets_a_stream_without_chunks(self) -> None:
        head, _, body = self.raw(self.completion("1.0", stream=True)).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        frames = body.decode().split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        assert all(frame.startswith("data: ") for frame in frames[:-1])
        chunked = self.raw(self.completion("1.1", stream=True)).partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in chunked[0].lower()

    def test_http_1_0_gets_a_whole_answer_with_its_length(self) -> None:
        head, _, body = self.raw(self.completion("1.0", stream=False)).partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head.lower()
        assert len(json.loads(body)["choices"]) == 1

    def test_http_1_0_gets_errors_and_heads(self) -> None:
        assert self.raw(b"GET /v1/nothing HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 404")
        head, _, body = self.raw(b"HEAD / HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
        assert (b"200" in head.splitlines()[0], body) == (True, b"")


def test_idle_connections_are_kept_longer_than_proxies_keep_theirs() -> None:
    assert KEEP_ALIVE_S > 60
    assert ConnectionLimits().keep_alive_s == Address("127.0.0.1", 1).keep_alive_s == KEEP_ALIVE_S
    with pytest.raises(ConfigurationError, match="keep_alive_s must be at least 1, got 0"):
        Address("127.0.0.1", 1, keep_alive_s=0)
