"""What is learnt of a stage that has died, from its files and from what Ray says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gptj_dist.stages import loss
from gptj_dist.stages.loss import LastWords, StageLoss, StageProcess, death_cause, last_words

KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Stage\n\tpid: 12\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer, (2) ray stop --force was called"
)
EXITED = "Worker exit detail: Worker exits unexpectedly. Worker exits with an exit code 3."


def test_a_stage_that_crashes_leaves_the_name_of_its_signal_and_its_last_log_line(tmp_path: Path) -> None:
    errors, log = tmp_path / "errors", tmp_path / "log"
    log.write_text("stage loads\nstage ready kv_blocks=7\n")
    with errors.open("wb") as file:
        code = "import faulthandler, os, signal; faulthandler.enable(); os.kill(os.getpid(), signal.SIGSEGV)"
        subprocess.run([sys.executable, "-c", code], stderr=file, check=False)
    words = last_words(StageProcess("here", 12, None, log, errors))
    assert replace(words, saw_oom_kill=False) == LastWords("stage ready kv_blocks=7", "Segmentation fault")
    assert death_cause(words, KILLED) == "crashed: Segmentation fault"


@pytest.mark.parametrize(
    ("report", "cause"),
    [
        (KILLED, "was killed by SIGKILL"),
        (EXITED, "exited with code 3"),
        ("Task was killed due to the node running low on memory.", "was killed by Ray, because its machine ran low"),
        ("The actor died.\n\tpid: 12\nThe node has died.", "died: The actor died. The node has died."),
        ("long " * 1000, "died: long long"),
    ],
)
def test_without_words_the_cause_is_what_ray_says(report: str, cause: str) -> None:
    found = death_cause(LastWords(), report)
    assert found.startswith(cause)
    assert len(found) <= 200


def test_a_node_that_does_not_answer_is_the_cause() -> None:
    assert death_cause(None, KILLED) == "was lost; its node does not answer, so it is gone or overloaded"


def test_a_kill_without_a_trace_is_blamed_on_memory_if_the_kernel_has_killed_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "_num_oom_kills", lambda: 4)
    for before, told in ((4, "or ended itself without a trace"), (3, "because memory ran out")):
        words = last_words(StageProcess("here", 12, None, None, None, before))
        assert death_cause(words, KILLED).endswith(told)


def test_files_that_are_missing_empty_large_or_no_text_are_no_error(tmp_path: Path) -> None:
    large, broken = tmp_path / "large", tmp_path / "broken"
    large.write_bytes(b"x" * 200_000 + b"\nthe end" + b"y" * 300)
    broken.write_bytes(b"\xff\xfe\n\x80")
    for path, line in ((None, None), (tmp_path / "none", None), (tmp_path, None), (broken, "\ufffd")):
        assert last_words(StageProcess("here", 12, None, path, path)) == LastWords(line)
    assert last_words(StageProcess("here", 12, None, large, large)).log_line == ("the end" + "y" * 300)[:200]


def test_a_process_knows_where_its_errors_go(tmp_path: Path) -> None:
    code = "from gptj_dist.stages.loss import StageProcess; print(StageProcess.this(None).errors)"
    with (tmp_path / "errors").open("wb") as file:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=file, check=True)
    assert done.stdout.decode().strip() == str(tmp_path / "errors")
    assert StageProcess.this(None).pid == os.getpid()


def test_a_loss_is_one_sentence() -> None:
    died = StageLoss(1, "crashed: Aborted", "alpha", 12, "stage ready")
    assert str(died) == "stage 1 (pid 12 on alpha) crashed: Aborted; its last log line: stage ready"
