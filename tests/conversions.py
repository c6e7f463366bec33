"""Runs conversions in separate processes that can be killed. Each is forked from a process that has imported torch."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gptj_dist.errors import GPTJDistError

_STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
"""Audit events of the interpreter that change files. `os.write` and `os.fsync` are counted as well."""


class Conversions:
    """Runs conversions one after the other. A context manager."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.conversions"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.communicate(timeout=60)

    def run(self, source: Path, destination: Path, **how: Any) -> tuple[int, str, float]:
        """Converts to bfloat16.

        Args:
            how: `overwrite`; `kill_at_step`, the number of the step before which the process is killed (or in the
                middle of which, if the step is a write); `kill_after_s`; `max_file_bytes`, which the kernel enforces.

        Returns:
            Exit code (-9 if it was killed), the error, and the seconds that it took.
        """
        assert self._server.stdin
        assert self._server.stdout
        order = {"source": str(source), "destination": str(destination), **how}
        print(json.dumps(order), file=self._server.stdin, flush=True)
        code, error, seconds = json.loads(self._server.stdout.readline())
        return int(code), str(error), float(seconds)


class Silent:
    """An observer of a conversion that says nothing."""

    def note(self, text: str) -> None:
        pass

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        pass


def _serve() -> None:
    import time

    import torch

    import gptj_dist.checkpoint.convert

    assert gptj_dist.checkpoint.convert
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in sys.stdin:
        order = json.loads(line)
        read_end, write_end = os.pipe()
        start_s = time.monotonic()
        if not (pid := os.fork()):
            os._exit(_convert(order, write_end))
        os.close(write_end)
        if (delay_s := order.get("kill_after_s")) is not None:
            signal.sigtimedwait({signal.SIGCHLD}, delay_s)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        signal.sigtimedwait({signal.SIGCHLD}, 0)
        with os.fdopen(read_end) as errors:
            print(json.dumps((code, errors.read(), time.monotonic() - start_s)), flush=True)


def _convert(order: dict[str, Any], errors: int) -> int:
    from gptj_dist.checkpoint.convert import convert_checkpoint

    if "max_file_bytes" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_file_bytes"], resource.RLIM_INFINITY))
    if "kill_at_step" in order:
        _kill_at(order["kill_at_step"])
    overwrite = order.get("overwrite", False)
    try:
        convert_checkpoint(Path(order["source"]), Path(order["destination"]), "bfloat16", overwrite, Silent())
    except GPTJDistError as error:
        os.write(errors, str(error).encode())
        return 1
    return 0


def _kill_at(step: int) -> None:
    num_left = step
    really_write = os.write

    def count(event: str, _: object) -> None:
        nonlocal num_left
        if event not in _STEPS:
            return
        num_left -= 1
        if not num_left:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(file: int, data: memoryview, /) -> int:
        if num_left == 1:
            really_write(file, data[: len(data) // 2])
        count("open", None)
        return really_write(file, data)

    sys.addaudithook(count)
    os.write = write  # type: ignore[assignment]
    # The kernel keeps the writes of a killed process; waiting for the disk would only slow the test.
    os.fsync = lambda fd: count("open", fd)


if __name__ == "__main__":
    _serve()
