"""Signals that end the launcher. Only the launcher receives them: in Ray's processes they are blocked.

A terminal, `timeout` and systemd send a signal to all processes of a group at once. If they were not blocked, Ray's
processes would die while the launcher still lets answers finish.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

SAME_SIGNAL_S = 0.2
"""`timeout` signals its child and then the child's whole group: signals that are this close count as one."""


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP, received by a separate thread and blocked in all threads that start later.

    Until `let_finish`, the first signal ends the process at once. After that, the first one sets `requested`, and a
    second one ends the process. SIGHUP stays ignored where it is (`nohup`), and never counts as a second signal: a
    terminal that closes may send several.

    Args:
        clean_up: called before a signal ends the process, on the thread of the signals. May be replaced.
    """

    def __init__(self, clean_up: Callable[[], None]) -> None:
        self.requested = threading.Event()
        self.can_finish = False
        self.clean_up = clean_up
        self._first_s = 0.0
        is_hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._awaited = {signal.SIGINT, signal.SIGTERM} | (set() if is_hangup_ignored else {signal.SIGHUP})

    def start(self) -> None:
        """Call on the main thread, before any other thread or process is started.

        An earlier thread, such as one that downloads, would receive signals, and this class would not.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        threading.Thread(target=self._receive, name="signals", daemon=True).start()

    def let_finish(self) -> None:
        """From now on the first signal sets `requested`, and the thread that waits for it ends the server."""
        self.can_finish = True

    def _receive(self) -> None:
        while True:
            self._handle(signal.sigwait(self._awaited))

    def _handle(self, number: int) -> None:
        now_s = time.monotonic()
        if not self.can_finish:
            self._end(number)
        elif not self.requested.is_set():
            self._first_s = now_s
            self.requested.set()
        elif number != signal.SIGHUP and now_s - self._first_s > SAME_SIGNAL_S:
            self._end(number)

    def _end(self, number: int) -> None:
        """Ends the process on a thread that Python waits for: `clean_up` may have the main one fail, and end first."""
        ending = threading.Thread(target=self._clean_up_and_exit, args=[number], name="end", daemon=False)
        with suppress(RuntimeError):  # the process is at its end already
            ending.start()
            ending.join()

    def _clean_up_and_exit(self, number: int) -> None:
        os.register_at_fork(before=threading.Event().wait)  # other threads start no more processes
        try:
            self.clean_up()
        finally:  # an error must not leave a process that no signal ends
            os._exit(128 + number)
