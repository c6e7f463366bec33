"""What can be learnt about a stage or a coordinator that has died: the cause, and its last log line. Ends hung ones."""

from __future__ import annotations

import os
import re
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MAX_LINE_CHARACTERS = 200
_TAIL_BYTES = 65_536
_FATAL_ERROR = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)  # written by Python's faulthandler
_EXIT_CODE = re.compile(r"exits with an exit code (\d+)")
_NO_TRACE = "connection error code"
_LOW_ON_MEMORY = "low on memory"  # Ray's memory monitor
_KILLED = "was killed by SIGKILL (the kernel sends it when memory runs out), or ended itself without a trace"
_OUT_OF_MEMORY = "was killed by SIGKILL, it seems by the kernel, which has killed a process because memory ran out"


@dataclass(frozen=True, slots=True)
class StageProcess:
    """The process of a stage or a coordinator, and where it writes.

    Args:
        host: name of its machine.
        begin: when it began, in the kernel's ticks since the machine started; None if that is unknown.
        log: file of its log lines; None if it logs nothing.
        errors: file of its standard error; None if that is no file.
        num_oom_kills: processes that the kernel of its machine had killed when it began, because memory ran out.
    """

    host: str
    pid: int
    begin: int | None
    log: Path | None
    errors: Path | None
    num_oom_kills: int = 0

    @classmethod
    def this(cls, log: Path | None) -> Self:
        """The process that calls this."""
        try:
            errors = Path("/proc/self/fd/2").readlink()
        except OSError:  # not Linux
            errors = None
        return cls(socket.gethostname(), os.getpid(), _begin_of(os.getpid()), log, errors, _num_oom_kills())


@dataclass(frozen=True, slots=True)
class LastWords:
    """The end of what a process has written.

    Args:
        log_line: the last line of its log.
        fatal_error: what Python's faulthandler wrote, such as `Segmentation fault`.
        saw_oom_kill: whether the kernel has killed a process for lack of memory since this one began.
    """

    log_line: str | None = None
    fatal_error: str | None = None
    saw_oom_kill: bool = False


@dataclass(frozen=True, slots=True)
class StageLoss:
    """The death of a stage.

    Args:
        cause: the signal, exit code or exception, as far as it is known; continues "stage 1".
        back_after_s: seconds until new stages took its place; None as long as they have not.
        lost_at: the time in UTC, as in logs; None where it is unknown.
    """

    stage: int
    cause: str
    node: str
    pid: int
    last_log_line: str | None
    back_after_s: float | None = None
    lost_at: str | None = None

    def __str__(self) -> str:
        last = "" if self.last_log_line is None else f"; its last log line: {self.last_log_line}"
        return f"stage {self.stage} (pid {self.pid} on {self.node}) {self.cause}{last}"


def end_process(process: StageProcess) -> None:
    """Kills a process if it still lives; called on its machine. Does nothing if another one has its pid by now."""
    if process.begin is not None and process.begin == _begin_of(process.pid):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def last_words(process: StageProcess) -> LastWords:
    """Reads the files of a process that has died; called on its machine."""
    lines = _tail(process.log).strip().splitlines()
    fatal_errors = _FATAL_ERROR.findall(_tail(process.errors))
    return LastWords(
        log_line=lines[-1][:MAX_LINE_CHARACTERS] if lines else None,
        fatal_error=fatal_errors[-1] if fatal_errors else None,
        saw_oom_kill=_num_oom_kills() > process.num_oom_kills,
    )


def death_cause(words: LastWords | None, report: str) -> str:
    """Why a process has died; continues its name.

    Args:
        words: None if its node did not answer.
        report: what Ray says about it; may be empty.
    """
    if words is None:
        return "was lost; its node does not answer, so it is gone or overloaded"
    if words.fatal_error is not None:
        return f"crashed: {words.fatal_error}"
    if (exit_code := _EXIT_CODE.search(report)) is not None:
        return f"exited with code {exit_code[1]}"
    if _LOW_ON_MEMORY in report:
        return "was killed by Ray, because its machine ran low on memory"
    if _NO_TRACE in report:
        return _OUT_OF_MEMORY if words.saw_oom_kill else _KILLED
    lines = [line for line in report.splitlines() if not line.startswith("\t")]
    return f"died: {' '.join(lines)}"[:MAX_LINE_CHARACTERS] if lines else "ended"


def _begin_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:  # it has ended, or this is not Linux
        return None


def _num_oom_kills() -> int:
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:  # not Linux
        return 0
    return int(counts.get("oom_kill", 0))


def _tail(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
