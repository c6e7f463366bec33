"""What it takes to start: seconds until ready, memory of all processes at its peak and at rest, bytes that stages read.

    python -m benchmarks.startup /path/to/gptj-6b --serve-args "--stages 2 --dtype bfloat16 --kv-cache-gb 2"

The weights' files are dropped from the page cache before they are read once in a row, for comparison, and again before
the server starts. The last line on standard output is one JSON document; memory is in GB of 10**9 bytes, summed over
all processes of the server, Ray's among them, as PSS (shared pages count in parts). Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.http import Load, measure, started
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import CheckpointIndex

SAMPLE_S = 0.5
READ_BYTES = 32 << 20
MARK = "GPTJ_DIST_BENCHMARK"


def main() -> None:
    """Measures, and prints the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--serve-args", default="--stages 2", help="arguments of gptj-dist serve")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    index = CheckpointIndex(resolve_model(args.model))
    files = [index.directory / name for name in sorted(set(index.file_of.values()))]
    figures: dict[str, Any] = {
        "model": args.model,
        "serve_args": args.serve_args,
        "file_gb": round(sum(path.stat().st_size for path in files) / 1e9, 2),
        "seconds_to_read_once": round(read_once(files), 1),
    }
    drop_from_cache(files)
    os.environ[MARK] = uuid.uuid4().hex
    memory = MemoryWatch(f"{MARK}={os.environ[MARK]}")
    with memory, started(args.model, args.serve_args.split()) as (base, ready_s):
        figures |= {"seconds_to_ready": round(ready_s, 1), "peak_gb": round(memory.peak_bytes / 1e9, 2)}
        figures |= {"at_rest_gb": round(memory.now() / 1e9, 2), "stage_read_gb": memory.stage_read_gb()}
        load = Load(tuple(map(int, args.streams.split(","))), args.max_tokens, rounds=1, num_first_tokens=3)
        figures |= asyncio.run(measure(base, args.model, load))
        figures["peak_under_load_gb"] = round(memory.peak_bytes / 1e9, 2)
    print(json.dumps(figures))


def read_once(files: Sequence[Path]) -> float:
    """Seconds to read the files from the disk, one after the other; their pages are given back on the way."""
    drop_from_cache(files)
    buffer = bytearray(READ_BYTES)
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while num_bytes := file.readinto(buffer):
                os.posix_fadvise(file.fileno(), file.tell() - num_bytes, num_bytes, os.POSIX_FADV_DONTNEED)
    return time.perf_counter() - begin


def drop_from_cache(files: Sequence[Path]) -> None:
    """Makes the next reader go to the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class MemoryWatch:
    """Samples the memory of all processes that have a mark in their environment, until the context ends."""

    def __init__(self, mark: str) -> None:
        self.peak_bytes = 0
        self._mark = mark.encode()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def now(self) -> int:
        """Bytes in use now."""
        return sum(map(pss_bytes, self._family()))

    def stage_read_gb(self) -> list[float]:
        """What each stage has read from files, sockets and pipes, in GB."""
        stages = [path for path in self._family() if b"ray::Stage" in _content(path / "cmdline")]
        return sorted(round(int(_content(path / "io").split()[1]) / 1e9, 3) for path in stages)

    def _family(self) -> list[Path]:
        processes = [path for path in Path("/proc").glob("[0-9]*") if path.name != str(os.getpid())]
        return [path for path in processes if self._mark in _content(path / "environ")]

    def _sample(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self.now())


def pss_bytes(process: Path) -> int:
    """A process's own pages, and its parts of those that it shares; 0 if it has ended."""
    for line in _content(process / "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    main()
