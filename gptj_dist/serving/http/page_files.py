"""The page at `/` and its files: read once, sent with an ETag and a policy that lets browsers load nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

PAGE = Path(__file__).with_name("page")
MEDIA = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}
FILES = tuple(sorted(path.name for path in PAGE.iterdir() if path.suffix in MEDIA and path.name != "index.html"))

HEADERS = {
    "cache-control": "no-cache",  # a browser asks each time, and gets a 304
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    media: str
    etag: str

    def answer(self, request: Request) -> Response:
        """The file; a 304 to a browser that has it."""
        headers = HEADERS | {"etag": self.etag}
        if self.etag in request.headers.get("if-none-match", "").replace("W/", "").split(", "):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media, headers=headers)


@cache
def page_file(name: str, root_path: str = "") -> PageFile:
    """One of `FILES`, or `index.html`.

    Args:
        root_path: the prefix of all paths; the page asks below it.
    """
    path = PAGE / name
    content = path.read_bytes()
    if root_path and name == "index.html":
        content = content.replace(b'<base href="/">', f'<base href="{escape(root_path)}/">'.encode())
    return PageFile(content, MEDIA[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:16]}"')
