"""Measures a server's start: seconds to ready, memory of all processes at the peak and at rest, bytes read by stages.

    python -m benchmarks.startup /path/to/gptj-6b --serve-args "--stages 2 --dtype bfloat16 --kv-cache-gb 2"

For comparison the weight files are first read once, one after the other. Before that and again before the server starts
they are dropped from the page cache. The last line on standard output is one JSON document. Memory is in GB of 10**9
bytes, summed as PSS (a shared page counts in parts) over all processes of the server, Ray's included. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.figures import print_document
from benchmarks.load import Target, closed_loop, serving_figures
from benchmarks.processes import Family, content
from benchmarks.servers import started
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import CheckpointIndex

SAMPLE_S = 1.0
READ_BYTES = 32 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--serve-args", default="--stages 2", help="arguments of gptj-dist serve")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8], help="clients at once")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    args = parser.parse_args()
    index = CheckpointIndex(resolve_model(args.model))
    files = [index.directory / name for name in sorted(set(index.file_of.values()))]
    figures: dict[str, Any] = {
        "model": args.model,
        "serve_args": args.serve_args,
        "file_gb": sum(path.stat().st_size for path in files) / 1e9,
        "seconds_to_read_once": read_once(files),
    }
    drop_from_cache(files)
    cases = [Case(num_clients, args.input_len, args.output_len) for num_clients in args.concurrency]
    print_document("startup", figures | measure(args.model, args.serve_args.split(), cases))


def measure(model: str, serve_args: Sequence[str], cases: Sequence[Case]) -> dict[str, Any]:
    """Starts a server and runs one load after the other."""
    family = Family()
    memory = MemoryWatch(family)
    with memory, started(model, serve_args, family.environment) as (base, ready_s):
        figures: dict[str, Any] = {"seconds_to_ready": ready_s, "peak_gb": memory.peak_bytes / 1e9}
        figures |= {"at_rest_gb": family.memory_bytes() / 1e9, "stage_read_gb": stage_read_gb(family)}
        target = Target(base, model)
        loads = [asyncio.run(closed_loop(target, case, case.batch, seed=case.batch)) for case in cases]
        figures["peak_under_load_gb"] = memory.peak_bytes / 1e9
    loads_figures = [
        {"max_concurrency": case.batch, **serving_figures(load, {})} for case, load in zip(cases, loads, strict=True)
    ]
    return figures | {"closed_loop": loads_figures}


def read_once(files: Sequence[Path]) -> float:
    """Seconds to read the files from the disk, one after the other. Drops their pages while reading."""
    drop_from_cache(files)
    buffer = bytearray(READ_BYTES)
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while num_bytes := file.readinto(buffer):
                os.posix_fadvise(file.fileno(), file.tell() - num_bytes, num_bytes, os.POSIX_FADV_DONTNEED)
    return time.perf_counter() - begin


def drop_from_cache(files: Sequence[Path]) -> None:
    """Drops the files from the page cache, so that the next reader reads from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class MemoryWatch:
    """Samples the memory of a family of processes until the context ends."""

    def __init__(self, family: Family) -> None:
        self.peak_bytes = 0
        self._family = family
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self._family.memory_bytes())


def stage_read_gb(family: Family) -> list[float]:
    """GB that each stage has read from files, sockets and pipes."""
    stages = [path for path in family.members() if b":stage-" in content(path / "cmdline")]
    return sorted(int(content(path / "io").split()[1]) / 1e9 for path in stages)


if __name__ == "__main__":
    main()
