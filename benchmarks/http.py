"""What a client feels: seconds until ready, time to first token, tokens/s of 1, 8 and 32 streams.

    python -m benchmarks.http                                    starts `gptj-dist serve demo`, measures it
    python -m benchmarks.http --base http://127.0.0.1:9000       measures a server that runs already (any OpenAI API)

The last line on standard output is one JSON document. Times are medians; streams all begin at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

PROMPT = "My fellow citizens of the United States, the state of the Union is"
READY_TIMEOUT_S = 180
STOP_TIMEOUT_S = 15


@dataclass(frozen=True)
class Load:
    """How the server is measured."""

    streams: tuple[int, ...]
    max_tokens: int
    rounds: int
    num_first_tokens: int


def main() -> None:
    """Measures, prints lines for people and the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a running server; without it one is started")
    parser.add_argument("--model", default="demo", help="the model to serve, or the name that the server knows it by")
    parser.add_argument("--serve-args", default="--stages 2", help="arguments of gptj-dist serve")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-tokens", type=int, default=40, help="requests for the time to first token")
    args = parser.parse_args()
    load = Load(tuple(map(int, args.streams.split(","))), args.max_tokens, args.rounds, args.first_tokens)
    figures: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "model": args.model}
    if args.base is not None:
        figures |= asyncio.run(measure(args.base, args.model, load))
    else:
        with started(args.model, args.serve_args.split()) as (base, ready_s):
            print(f"ready after {ready_s:.1f} s", flush=True)
            figures |= {"seconds_to_ready": round(ready_s, 2), **asyncio.run(measure(base, args.model, load))}
    print(json.dumps(figures))


@contextmanager
def started(model: str, serve_args: Sequence[str]) -> Iterator[tuple[str, float]]:
    """`gptj-dist serve` as a process of its own; gives its URL and the seconds from the command to ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "gptj_dist", "serve", model, *serve_args, "--port", str(port)]
    begin = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        while not is_ready(base):
            if server.poll() is not None or time.perf_counter() - begin > READY_TIMEOUT_S:
                sys.exit(f"{' '.join(command)} did not become ready")
            time.sleep(0.02)
        yield base, time.perf_counter() - begin
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(STOP_TIMEOUT_S)


def is_ready(base: str) -> bool:
    """Whether a token can be made."""
    try:
        return httpx.get(f"{base}/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


async def measure(base: str, model: str, load: Load) -> dict[str, Any]:
    """The figures of a server that is ready."""
    await asyncio.gather(*(stream(base, model, 16) for _ in range(4)))  # warm
    first_ms = [1000 * (await stream(base, model, 8)) for _ in range(load.num_first_tokens)]
    figures: dict[str, Any] = {
        "first_token_ms_median": round(statistics.median(first_ms), 2),
        "first_token_ms_p90": round(statistics.quantiles(first_ms, n=10)[-1], 2),
    }
    print(f"first token after {figures['first_token_ms_median']} ms (p90 {figures['first_token_ms_p90']})", flush=True)
    for num_streams in load.streams:
        rates = [await rate(base, model, num_streams, load.max_tokens) for _ in range(load.rounds)]
        figures[f"tokens_per_s_{num_streams}"] = round(statistics.median(rates), 1)
        print(f"{num_streams:3d} streams: {figures[f'tokens_per_s_{num_streams}']} tokens/s", flush=True)
    return figures


async def rate(base: str, model: str, num_streams: int, max_tokens: int) -> float:
    """Tokens per second of all streams together, from the first request to the last token."""
    begin = time.perf_counter()
    await asyncio.gather(*(stream(base, model, max_tokens) for _ in range(num_streams)))
    return num_streams * max_tokens / (time.perf_counter() - begin)


async def stream(base: str, model: str, max_tokens: int) -> float:
    """Runs one stream to its end; seconds until its first event.

    A bare socket: on a machine of two cores a client library would be measured along with the server.
    """
    url = urlsplit(base)
    body = json.dumps(
        {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
    answer = await reader.readuntil(b"data: ")
    first_s = time.perf_counter() - begin
    while part := await reader.read(65536):
        answer = answer[-100:] + part
    writer.close()
    if b"[DONE]" not in answer:
        raise RuntimeError(f"the stream ended without [DONE]: {answer!r}")
    return first_s


if __name__ == "__main__":
    main()
