"""A fake Hugging Face hub on loopback. Serves the requests of `huggingface_hub` and records them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK_BYTES = 16_384
ADVICE = "Warning: You are sending unauthenticated requests to the HF Hub. Please set a HF_TOKEN ..."


@dataclass
class Asked:
    """One request.

    Args:
        file: the requested file of a repository; None for a request to the API.
        range: the Range header.
        token: the token after `Bearer`.
        num_bytes: number of bytes of the body that were sent.
    """

    method: str
    path: str
    file: str | None
    range: str | None
    token: str | None
    num_bytes: int = 0


@dataclass
class Repository:
    """A model of the hub.

    Args:
        commits: commit -> directory of its files.
        branches: name -> commit.
        required_token: without it, the hub denies that the repository exists.
        is_gated: its files need an approved account; no account is approved.
    """

    commits: dict[str, Path]
    branches: dict[str, str]
    required_token: str | None = None
    is_gated: bool = False

    def move(self, branch: str, directory: Path) -> str:
        """Points a branch at a new commit with the files of a directory; returns the commit."""
        commit = hashlib.sha1(f"{directory} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = directory
        self.branches[branch] = commit
        return commit


@dataclass
class Hub:
    """The server's repositories, and the requests that it received.

    Args:
        cuts: file -> numbers of bytes after which its next responses break off, one for each response.
        gates: file -> event that a response waits for before it sends its last chunk.
        refused_tokens: invalid tokens.
    """

    base: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    refused_tokens: set[str] = field(default_factory=set)

    def add(self, name: str, directory: Path) -> Repository:
        """Adds a repository whose `main` has the files of a directory."""
        self.repositories[name] = repository = Repository({}, {})
        repository.move("main", directory)
        return repository

    def downloads(self) -> list[str]:
        """The files whose content was requested, in order."""
        return [asked.file for asked in self.asked if asked.method == "GET" and asked.file]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that uses this server as the hub, and `home` as its cache."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return (
            inherited
            | {
                "HF_ENDPOINT": self.base,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
            }
            | more
        )


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Runs a hub without repositories on a free port until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.base = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for gate in hub.gates.values():
            gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        name, kind, rest = _parse(path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        asked = Asked(self.command, path, None, self.headers.get("Range"), token)
        self.hub.asked.append(asked)
        try:
            repository = self._repository(name, token)
            if kind == "resolve":
                self._send_file(repository, asked, rest)
            else:
                self._send_info(name, repository, rest or "main")
        except _RefusedError as refusal:
            self._refuse(refusal)

    def _repository(self, name: str, token: str | None) -> Repository:
        if token in self.hub.refused_tokens:
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, None, "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(name)
        if repository is None or repository.required_token not in (None, token):
            # Like the hub, the server does not reveal without a token whether a repository exists.
            status = HTTPStatus.NOT_FOUND if token else HTTPStatus.UNAUTHORIZED
            raise _RefusedError(status, "RepoNotFound", "Repository not found")
        return repository

    def _send_info(self, name: str, repository: Repository, revision: str) -> None:
        commit = _commit(repository, revision)
        files = sorted(path.name for path in repository.commits[commit].iterdir())
        info = {"id": name, "modelId": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        self._send(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _send_file(self, repository: Repository, asked: Asked, rest: str) -> None:
        revision, _, file = rest.rpartition("/")  # a branch, too, may have slashes in its name
        commit = _commit(repository, revision)
        if repository.is_gated:
            status = HTTPStatus.FORBIDDEN if asked.token else HTTPStatus.UNAUTHORIZED
            raise _RefusedError(status, "GatedRepo", "Access to this model is restricted")
        path = repository.commits[commit] / file
        asked.file = file
        if not path.is_file():
            raise _RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        headers["Content-Disposition"] = f'inline; filename="{file}";'  # the client's progress bar shows it
        if asked.range is None:
            self._send(HTTPStatus.OK, headers, content, asked)
        else:
            start = int(asked.range.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(HTTPStatus.PARTIAL_CONTENT, headers, content[start:], asked)

    def _refuse(self, refusal: _RefusedError) -> None:
        headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
        self._send(refusal.status, headers, json.dumps({"error": refusal.message}).encode())

    def _send(self, status: HTTPStatus, headers: Mapping[str, str], body: bytes, asked: Asked | None = None) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        if "Authorization" not in self.headers:
            self.send_header("X-HF-Warning", f"unauthenticated; {ADVICE}")
        self.end_headers()
        if self.command == "GET":
            self._send_body(body, asked)

    def _send_body(self, body: bytes, asked: Asked | None) -> None:
        file = asked.file if asked is not None else None
        cuts = self.hub.cuts.get(file or "", [])
        end = cuts.pop(0) if cuts else len(body)
        gate = self.hub.gates.get(file or "")
        for begin in range(0, end, CHUNK_BYTES):
            if gate is not None and begin + CHUNK_BYTES >= len(body):
                gate.wait(timeout=60)
            try:
                self.wfile.write(body[begin : min(begin + CHUNK_BYTES, end)])
            except OSError:  # the client has disconnected
                self.close_connection = True
                return
            if asked is not None:
                asked.num_bytes += min(CHUNK_BYTES, end - begin)
        self.close_connection = self.close_connection or end < len(body)


def _parse(path: str) -> tuple[str, str, str]:
    """`(owner/name, "resolve" or "revision", what follows)` of a URL's path."""
    parts = path.removeprefix("/api/models").strip("/").split("/")
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", "/".join(parts[3:])


def _commit(repository: Repository, revision: str) -> str:
    commit = repository.branches.get(revision, revision)
    if commit not in repository.commits:
        raise _RefusedError(HTTPStatus.NOT_FOUND, "RevisionNotFound", "Invalid rev id: " + revision)
    return commit
