"""The launcher's own Ray: which of Ray's processes has ended is known from a part of Ray that is not public."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from gptj_dist.operate.launch.processes import command_lines
from tests.http.command import running, wait_until_gone

pytestmark = pytest.mark.ray

LAUNCHER = """
import time
from gptj_dist.operate.launch.local_ray import LocalRay
from gptj_dist.operate.launch.session_room import find_room

local = LocalRay(find_room())
local.noise.touch()
local.start(120.0, print)
print("before:", local.lost_process(), flush=True)
while local.lost_process() is None:
    time.sleep(0.05)
print("lost:", local.lost_process(), flush=True)
local.stop()
local.discard_empty_logs()
"""


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_process_of_rays_own_that_ends_is_noticed_by_its_name(name: str) -> None:
    # pytest's own directories are too long for Ray's sockets
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as room,
        running([sys.executable, "-c", LAUNCHER], {**os.environ, "RAY_TMPDIR": room}) as command,
    ):
        assert command.wait_for(r"before: (\S+)") == "None"
        lines = command_lines()
        (pid,) = [pid for pid in command.family() if Path(lines[pid][0]).name == name]
        os.kill(pid, signal.SIGKILL)
        assert command.wait_for(r"lost: (\S+)") == name
        wait_until_gone(command)
