"""Hostile requests, which try to keep a server from answering others. Each case runs in a process of its own.

    python -m benchmarks.workers.hostile_cases CASE HOST PORT

The process builds its bytes, prints `ready`, waits for a line on standard input, attacks, and prints the server's
responses as one JSON document. Stdlib only.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import string
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LARGE = 3_900_000
"""Bytes of a body just below the server's limit."""

TIMEOUT_S = 20.0
"""Seconds after which a case is given up."""

MODERATED = ("moderator never returns", "sync moderator never returns")
"""Cases that need a server with `benchmarks.hostile_moderator`."""


@dataclass(slots=True)
class Seen:
    """The server's responses to a case.

    Attributes:
        statuses: the number of responses by HTTP status, or by failure where there was no status.
        first_s, last_s: seconds until the first and the last response.
        num_bytes: size of the largest response.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    first_s: float | None = None
    last_s: float = 0.0
    num_bytes: int = 0

    def document(self) -> dict[str, Any]:
        return {
            "statuses": dict(self.statuses),
            "first_s": self.first_s,
            "last_s": self.last_s,
            "answer_bytes": self.num_bytes,
        }


@dataclass(slots=True)
class Attack:
    """Sends a case's requests to a server and notes its responses."""

    host: str
    port: int
    seen: Seen
    begin_s: float = 0.0

    async def post(self, path: str, body: bytes, most_bytes: int = 1 << 26) -> None:
        """Sends a request and reads the response."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        await self.send([head.encode(), body], most_bytes)

    async def send(self, parts: list[bytes], most_bytes: int = 1 << 26) -> None:
        """Sends bytes and reads the response."""
        await self._counted(self._send(parts, most_bytes))

    async def drip(self, head: bytes, byte: bytes) -> None:
        """Sends a byte a second until the server cuts the connection."""
        await self._counted(self._drip(head, byte))

    async def _counted(self, answer: Awaitable[tuple[str, int]]) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, num_bytes = await answer
        except TimeoutError:
            status, num_bytes = "no answer", 0
        except OSError as error:
            status, num_bytes = type(error).__name__, 0
        now_s = time.perf_counter() - self.begin_s
        self.seen.statuses[status] += 1
        self.seen.first_s = now_s if self.seen.first_s is None else self.seen.first_s
        self.seen.last_s = now_s
        self.seen.num_bytes = max(self.seen.num_bytes, num_bytes)

    async def _send(self, parts: list[bytes], most_bytes: int) -> tuple[str, int]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writing = asyncio.create_task(_write(writer, parts))
        try:
            return await _read_answer(reader, most_bytes)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            writer.close()

    async def _drip(self, head: bytes, byte: bytes) -> tuple[str, int]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(head)
        reading = asyncio.create_task(_read_answer(reader, 1 << 16))
        try:
            while not reading.done():
                writer.write(byte)
                await writer.drain()
                await asyncio.wait([reading], timeout=1)
            return reading.result()
        finally:
            reading.cancel()
            writer.close()


async def _write(writer: asyncio.StreamWriter, parts: list[bytes]) -> None:
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
    except OSError:  # the response says why the server reads no more
        return


async def _read_answer(reader: asyncio.StreamReader, most_bytes: int) -> tuple[str, int]:
    status = (await reader.readline()).split()
    num_bytes = 0
    while num_bytes < most_bytes and (part := await reader.read(1 << 16)):
        num_bytes += len(part)
    return (status[1].decode() if len(status) > 1 else "cut off"), num_bytes


Case = Callable[[Attack], Awaitable[None]]


def _completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "Once", "max_tokens": 4, **fields}, separators=(",", ":")).encode()


def _completing(**fields: Any) -> Case:
    body = _completion(**fields)
    return lambda attack: attack.post("/v1/completions", body)


def _tokenizing(**fields: Any) -> Case:
    body = json.dumps(fields).encode()
    return lambda attack: attack.post("/tokenize", body)


def _nothing() -> Case:
    """The control: shows the gaps that the machine itself causes."""
    return lambda _: asyncio.sleep(2)


def _one_header() -> Case:
    parts = [b"GET /v1/models HTTP/1.1\r\nHost: x\r\nx: ", *[b"a" * (1 << 20)] * 126, b"\r\n\r\n"]
    return lambda attack: attack.send(parts)


def _many_headers() -> Case:
    headers = b"".join(b"x%d: a\r\n" % number for number in range(600_000))
    return lambda attack: attack.send([b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", headers, b"\r\n"])


def _letters() -> str:
    return "".join(random.Random(1).choices(string.ascii_lowercase, k=LARGE))


def _english() -> str:
    words = ["the", "quick", "brown", "fox", "jumps,", "over", "a", "lazy", "dog.", "Then", "it", "sleeps"]
    return " ".join(random.Random(2).choices(words, k=LARGE // 5))[:LARGE]


def _repeated(number: int, **fields: Any) -> Case:
    body = _completion(**fields)

    async def run(attack: Attack) -> None:
        await asyncio.gather(*(attack.post("/v1/completions", body) for _ in range(number)))

    return run


def _dripping(head: bytes, byte: bytes) -> Case:
    async def run(attack: Attack) -> None:
        await asyncio.gather(*(attack.drip(head, byte) for _ in range(300)))

    return run


def _properties(number: int, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{i}": {"type": "string"} for i in range(number)}


def _following(**grammar: Any) -> Case:
    """A few texts that follow a grammar."""
    return _repeated(4, structured_outputs=grammar, max_tokens=64)


CASES: Mapping[str, Callable[[], Case]] = {
    "nothing": _nothing,
    "one header of 126 MB": _one_header,
    "600,000 headers": _many_headers,
    "prompt: one character": lambda: _completing(prompt="a" * LARGE),
    "prompt: spaces": lambda: _completing(prompt=" " * LARGE),
    "prompt: letters": lambda: _completing(prompt=_letters()),
    "prompt: English": lambda: _completing(prompt=_english()),
    "prompt: 990,000 strings": lambda: _completing(prompt=["a"] * 990_000),
    "prompt: 1,900,000 ids": lambda: _completing(prompt=[1] * 1_900_000),
    "prompt: 900,000 lists": lambda: _completing(prompt=[[1]] * 900_000),
    "bad_words: 990,000": lambda: _completing(bad_words=["a"] * 990_000),
    "logit_bias: 200,000": lambda: _completing(logit_bias={str(number): 1 for number in range(200_000)}),
    "stop: 1 MB, n: 8": lambda: _completing(stop="a" * 1_000_000, n=8),
    "stop: 16 of 2,001, 900 tokens": lambda: _completing(
        prompt="a" * 40, stop=["a" * (2000 - k) + "b" * (k + 1) for k in range(16)], max_tokens=900, ignore_eos=True
    ),
    "n: 100, logprobs: 20": lambda: _completing(n=100, logprobs=20, max_tokens=200, ignore_eos=True),
    "echo, logprobs: 20, n: 8": lambda: _completing(prompt=[1] * 2000, echo=True, logprobs=20, n=8),
    "1,000 prompts": lambda: _completing(prompt=["Once upon a time"] * 1000, max_tokens=8),
    "300 requests of 1,024 completions": lambda: _repeated(300, prompt=["Once"] * 8, n=128),
    "/tokenize": lambda: _tokenizing(prompt=_english()),
    "/tokenize with strings": lambda: _tokenizing(prompt=_english(), return_token_strs=True),
    "/tokenize of 1 MB with strings": lambda: _tokenizing(prompt=_letters()[:900_000], return_token_strs=True),
    "schema: 512 properties": lambda: _following(json={"type": "object", "properties": _properties(512)}),
    "schema: 20 x 80 properties": lambda: _following(
        json={"anyOf": [{"type": "object", "properties": _properties(80, f"{i}-")} for i in range(20)]}
    ),
    "schema: 2,000 properties": lambda: _following(json={"type": "object", "properties": _properties(2000)}),
    "schema: 9,000 values": lambda: _following(json={"enum": [f"value {i}" for i in range(9000)]}),
    "schema: 150 deep": lambda: _following(json=json.loads('{"items":' * 150 + "{}" + "}" * 150)),
    "schema: a large multiple": lambda: _following(json={"type": "integer", "multipleOf": 10_000_003}),
    "schema: 400 dates": lambda: _following(json={"prefixItems": [{"type": "string", "format": "date-time"}] * 400}),
    "regex: repetitions": lambda: _following(regex="((a{1,1000}){1000}b){1000}"),
    "grammar: repetitions": lambda: _following(grammar='start: ("a"{1,1000}){1,1000}'),
    "grammar: 900 options": lambda: _following(grammar="start: " + '"a"? ' * 900),
    "grammar: 5,000 brackets": lambda: _following(grammar="root ::= " + "(" * 5000),
    "field name of 3.9 MB": lambda: _completing(**{"x" * LARGE: 1}),
    "300 slow headers": lambda: _dripping(b"GET / HTTP/1.1\r\nx: ", b"a"),
    "300 slow bodies": lambda: _dripping(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b" "
    ),
    "2,000 streams": lambda: _repeated(2000, max_tokens=64, stream=True, ignore_eos=True),
    "moderator never returns": lambda: _completing(prompt="HANG", timeout_s=4),
    "sync moderator never returns": lambda: _completing(prompt="BLOCK", timeout_s=4),
}


async def _attack(case: Case, attack: Attack) -> None:
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    attack.begin_s = time.perf_counter()
    await case(attack)
    print(json.dumps(attack.seen.document()), flush=True)


def main() -> None:
    """Runs the case that the command line names."""
    name, host, port = sys.argv[1:]
    os.nice(10)  # a real attacker has its own machine
    asyncio.run(_attack(CASES[name](), Attack(host, int(port), Seen())))


if __name__ == "__main__":
    main()
