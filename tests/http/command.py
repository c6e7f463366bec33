"""Runs `gptj-dist` as a separate process, like a user, and finds all processes that it starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
STOP_LIMIT_S = 150.0


@dataclass
class Command:
    """A running command.

    Args:
        mark: a variable in the environment of the process and of all its descendants.
    """

    process: subprocess.Popen[bytes]
    mark: str
    log: IO[bytes] = field(repr=False)

    def output(self) -> str:
        """The output so far."""
        return Path(self.log.name).read_text()

    def family(self) -> list[int]:
        """Live processes that descend from the command."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_ours(path)]

    def wait_for(self, pattern: str, timeout_s: float = 240.0) -> str:
        """Waits until the output matches. Returns the group of the first match."""

        def find() -> list[str]:
            assert self.process.poll() is None, f"the command has ended:\n{self.output()}"
            return re.findall(pattern, self.output())

        return wait_until(find, f"{pattern!r} is printed", timeout_s)[0]

    def interrupt(self) -> None:
        """Sends SIGINT to the whole process group, like Ctrl-C at a terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def _is_ours(self, path: Path) -> bool:
        try:
            return self.mark.encode() in (path / "environ").read_bytes()
        except OSError:
            return False


def wait_until_gone(command: Command) -> None:
    """Waits until the command and all its descendants have ended."""
    command.process.wait(timeout=STOP_LIMIT_S)
    wait_until(lambda: command.family() == [], "no process is left", STOP_LIMIT_S)


@contextmanager
def running(
    command: Sequence[str], inherited: Mapping[str, str] = os.environ, directory: Path = ROOT
) -> Iterator[Command]:
    """Runs the command in its own process group, and kills its remaining processes when the context ends.

    Args:
        inherited: the environment, to which the mark and a width of 120 columns are added.
        directory: where it runs.
    """
    mark = f"GPTJ_DIST_TEST={uuid.uuid4().hex}"
    environment = {**inherited, "COLUMNS": "120", mark.partition("=")[0]: mark.partition("=")[2]}
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
        started = Command(process, mark, log)
        try:
            yield started
        finally:
            for pid in started.family():
                os.kill(pid, signal.SIGKILL)
            process.wait()
