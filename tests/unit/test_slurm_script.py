"""`cluster/slurm/serve.sbatch` forms a cluster, serves on it and cleans up. Slurm and gptj-dist are stand-ins here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "slurm" / "serve.sbatch"
LIMIT_S = 120.0
CODE = "1C504-00H1W-1DB9Z-YR0GN-VJ7FP"

SCONTROL = '[ "$*" = "show hostnames trio[1-3]" ] && printf "trio1\\ntrio2\\ntrio3\\n"'

SRUN = """
options=$*
while [ "${1#--}" != "$1" ]; do shift; done
echo "${options##*--nodelist=}" >> "$CALLS"
exec "$@"
"""

GPTJ_DIST = f"""
trap 'echo "$1 ends" >> "$CALLS"; exit 0' TERM
if [ "$1" = up ]; then
    [ -e "$BROKEN" ] && exit 1
    printf "Starting the cluster's head at 10.0.0.7:6379 ...\\n\\nThe cluster is up. On each further machine:\\n\\n"
    printf "  gptj-dist join {CODE}\\n\\nThen, here:\\n\\n  gptj-dist serve demo --address auto --stages 2\\n"
fi
[ "$1" = serve ] && echo "Ready after 1 s"
while :; do sleep 0.1; done
"""
"""Prints what `up` prints (`operate/cluster/run.py`), and stays until SIGTERM."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on three nodes, with the stand-ins before all other programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {"scontrol": SCONTROL, "srun": SRUN, "gptj-dist": GPTJ_DIST}.items():
        path = programs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    own = {"SLURM_JOB_NODELIST": "trio[1-3]", "SLURM_CPUS_PER_TASK": "8", "MODEL": "/shared/gpt-j", "INTERFACE": "ib0"}
    files = {"CALLS": str(tmp_path / "calls"), "BROKEN": str(tmp_path / "broken"), "TMPDIR": str(tmp_path)}
    return os.environ | own | files | {"PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.fixture
def job(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", str(SCRIPT)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_job_serves_on_all_its_nodes_and_ends_the_server_before_its_cluster(
    job: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    calls, log = tmp_path / "calls", tmp_path / "log"
    wait_until(lambda: "Ready after" in log.read_text(), "it serves", LIMIT_S)
    wait_until(lambda: calls.read_text().count(" join ") == 2, "the others have joined", LIMIT_S)
    asked = set(calls.read_text().splitlines())
    assert asked == {
        "trio1 gptj-dist up --cpus 8 --interface ib0",
        f"trio2 gptj-dist join {CODE} --cpus 8",
        f"trio3 gptj-dist join {CODE} --cpus 8",
        "trio1 gptj-dist serve /shared/gpt-j --stages 3 --device cpu --port 8000 --cpus-per-stage 7"
        " --address 10.0.0.7:6379",
    }
    assert CODE not in log.read_text()  # others may read it
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=LIMIT_S) == 0, log.read_text()
    ends = re.findall(r"^(\w+) ends$", calls.read_text(), re.MULTILINE)
    assert ends[0] == "serve"
    assert sorted(ends[1:]) == ["join", "join", "up"]
    assert list(tmp_path.glob("tmp.*")) == []  # the file with the code


def test_a_head_that_does_not_start_ends_the_job_with_a_message(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1
    assert "trio1: the cluster did not start" in done.stdout
