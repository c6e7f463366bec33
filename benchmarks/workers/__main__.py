"""Runs an engine in a process of its own: `python -P -m benchmarks.workers KIND SETTINGS`, with settings as JSON.

KIND is `ours`, `vllm`, `ct2`, `openvino` or `limits`, and names the module `KIND_worker` beside this one.
When the engine is ready, writes a JSON line that describes it. Then answers each JSON line on standard input with one,
until standard input ends. `gptj_dist` is imported from the current directory. All other output, of any library, goes to
standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

from benchmarks.workers.worker import Worker


def main() -> None:
    """Serves until standard input ends."""
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    begin = time.perf_counter()
    worker: Worker = importlib.import_module(f"benchmarks.workers.{kind}_worker").open_worker(settings)
    try:
        answers.write(json.dumps({**worker.about(), "seconds_to_ready": time.perf_counter() - begin}) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
    finally:
        worker.close()


if __name__ == "__main__":
    main()
