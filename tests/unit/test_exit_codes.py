"""Every verb with paths that are not there, a reader who leaves, arguments that are no text, and no home.

A failure has an exit code other than 0 and is told in words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptj_dist import cli
from gptj_dist.cli import CANNOT_WORK, COMMANDS, FAILED
from gptj_dist.operate.launch.signals import StopSignals
from tests.adapters import model_config, write_lora
from tests.fake_server import Call, FakeServer, Reply, events, fake_server, refused
from tests.unit.test_status_command import READY
from tests.verbs import command_line, environment

pytestmark = pytest.mark.slow

Arguments = Sequence[str | bytes | Path]

MISSING = "/no/such/directory"
NO_TEXT = b"caf\xe9"
NO_HOME = {"HOME": "/dev/null", "XDG_CACHE_HOME": "", "HF_HOME": "/dev/null/hub"}
REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}


def run(*arguments: str | bytes | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*command_line(), *arguments],
        stdin=subprocess.DEVNULL,
        env=environment(**(env or {})),
        capture_output=True,
        timeout=120,
        check=False,
    )


@contextmanager
def a_server() -> Iterator[FakeServer]:
    """A server that answers every verb."""
    text = {"text": " yes", "delta": {"content": " yes"}, "index": 0, "finish_reason": None}
    answer = {"choices": [text], "usage": {"completion_tokens": 1}}

    def reply(call: Call) -> Reply:
        if call.path in READY:
            return READY[call.path]
        if call.path not in ("/v1/completions", "/v1/chat/completions"):
            return refused(404, "not served here")
        return events(answer) if call.json().get("stream") else Reply(body=answer)

    with fake_server(reply) as server:
        yield server


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests"
    path.write_text(json.dumps(REQUEST) + "\n")
    write_lora(tmp_path / "adapter", model_config("demo"), layers=(0,))
    return path


def lines(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    """What it says on standard error; a traceback is no way to say it."""
    assert b"Traceback" not in done.stderr + done.stdout
    return done.stderr.decode(errors="replace").splitlines()


def call(arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a verb in this process: one of its own would take longest to import torch."""
    monkeypatch.setattr(StopSignals, "start", lambda _: None)  # its thread would take Ctrl-C from later tests
    monkeypatch.setattr(sys, "argv", ["gptj-dist", *map(os.fsdecode, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


IN, OUT, ADAPTER = "IN", "OUT", "ADAPTER"
"""Stand for the batch's files, and an adapter, in the lists of arguments."""


def with_files(arguments: Arguments, requests: Path) -> list[str | bytes | Path]:
    files = {IN: requests, OUT: requests.parent / "out", ADAPTER: requests.parent / "adapter"}
    return [files.get(str(argument), argument) for argument in arguments]


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", MISSING],
        ["serve", "demo", "--lora-modules", f"a={MISSING}"],
        ["adapter", "inspect", MISSING],
        ["serve", "demo", "--chat-template", MISSING],
        ["serve", "demo", "--api-keys", MISSING],
        ["serve", "demo", "--tls-cert", MISSING, "--tls-key", MISSING],
        ["serve", "demo", "--trace", f"{MISSING}/trace"],
        ["plan", MISSING],
        ["plan", MISSING, "--check"],
        ["plan", "demo", "--devices", f"{MISSING}.yaml"],
        ["generate", "demo", "--prompt", "x", "--trace", f"{MISSING}/trace"],
        ["batch", MISSING, OUT],
        ["batch", IN, f"{MISSING}/answers"],
        ["batch", IN, OUT, "--model", MISSING],
        ["download", MISSING],
        ["inspect", MISSING],
        ["convert", MISSING, OUT],
        ["convert", "demo", "/dev/null/copy"],
        ["verify", "demo", "--prompts", MISSING],
        ["drift", "demo", "--text", MISSING],
        ["synth", "tiny", "/dev/null/model"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_a_path_that_is_not_there_is_named_at_the_end_without_a_traceback(
    arguments: list[str], requests: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(with_files(arguments, requests), monkeypatch) in (FAILED, CANNOT_WORK)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    told = err.splitlines()
    assert len(told) == 1 or arguments[0] == "batch", told
    assert told[-1].startswith("gptj-dist: ")
    assert MISSING in told[-1] or "/dev/null" in told[-1]


def test_a_directory_that_is_not_there_is_a_finding_of_the_doctor() -> None:
    done = run("doctor", MISSING)
    assert (done.returncode, lines(done)) == (1, [])
    assert f"there is no directory {MISSING}" in done.stdout.decode()


OF_CLUSTERS = ("up", "join", "nodes", "leave")
READ_BY_HEAD = [
    ["plan", "demo"],
    ["doctor", "demo", "--device", "cpu"],
    ["inspect", "demo"],
    ["download", "demo"],
    ["status"],
    ["status", "--json"],
    ["top", "--once"],
    ["top", "--json"],
    ["key", "--name", "alice"],
    ["complete", "x", "--json"],
    ["complete", "x", "--no-stream"],
    ["chat", "--message", "x"],
    ["generate", "demo", "--prompt", "x", "--max-tokens", "3"],
    ["batch", IN, OUT],
    ["synth", "tiny", OUT],
    ["convert", "demo", OUT],
    ["drift", "demo", "--tokens", "256", "--quantize", "int8"],
    ["adapter", "inspect", ADAPTER],
]


NOTELESS = ("key", "plan", "generate", "complete")
"""Verbs that print nothing on standard error; of a reader who leaves there is nothing to say."""


@pytest.mark.parametrize("arguments", READ_BY_HEAD, ids=" ".join)
def test_a_reader_who_leaves_is_no_success_and_no_traceback(arguments: list[str], requests: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with a_server() as server, os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [*command_line(), *with_files(arguments, requests)],
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=subprocess.PIPE,
            env=environment(GPTJ_URL=server.base),
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    if arguments[0] in NOTELESS:
        assert done.stderr == b""
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", NO_TEXT],
        ["serve", "demo", "--host", NO_TEXT],
        ["serve", "demo", "--api-key", NO_TEXT],
        ["serve", "demo", "--address", NO_TEXT],
        ["serve", "demo", "--address", NO_TEXT + b":1"],
        ["serve", "demo", "--chat-template", NO_TEXT],
        ["serve", "demo", "--log-format", NO_TEXT],
        ["stop", "--address", NO_TEXT],
        ["stop", "--address", NO_TEXT + b":1"],
        ["status", "--url", NO_TEXT],
        ["status", "--api-key", NO_TEXT],
        ["top", "--url", b"http://" + NO_TEXT],
        ["plan", "demo", "--layers", NO_TEXT],
        ["doctor", "--host", NO_TEXT],
        ["doctor", "--address", NO_TEXT + b":1"],
        ["key", "--requests-per-minute", NO_TEXT],
        ["complete", "x", "--url", NO_TEXT],
        ["chat", "--message", "x", "--api-key", NO_TEXT],
        ["batch", NO_TEXT, OUT],
        ["batch", IN, OUT, "--url", NO_TEXT],
        ["download", NO_TEXT],
        ["download", "owner/name", "--revision", NO_TEXT],
        ["inspect", NO_TEXT],
        ["convert", NO_TEXT, OUT],
        ["synth", NO_TEXT, OUT],
        ["adapter", "inspect", NO_TEXT],
    ],
    ids=str,
)
def test_an_argument_that_is_no_text_and_names_nothing_is_refused(
    arguments: Arguments, requests: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`test_streams` gives some to a process of its own."""
    assert call(with_files(arguments, requests), monkeypatch) in (FAILED, CANNOT_WORK)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err or arguments[0] == "doctor"


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["generate", "demo", "--prompt", "x", "--max-tokens", "2"], 0),
        (["inspect", "demo"], 0),
        (["key"], 0),
        (["status"], 0),
        (["complete", "x"], 0),
        (["download", "owner/name"], 2),
        (["serve", "owner/name"], 2),
    ],
    ids=str,
)
def test_without_a_home_verbs_work_or_say_what_they_lack(arguments: list[str], exit_code: int, requests: Path) -> None:
    with a_server() as server:
        done = run(*with_files(arguments, requests), env={**NO_HOME, "GPTJ_URL": server.base})
    told = lines(done)
    assert done.returncode == exit_code, told
    assert len(told) <= 1 or exit_code == 0


def test_every_verb_that_is_quick_and_leaves_others_alone_is_tried() -> None:
    verbs = {verb.__name__ for group in COMMANDS.values() for verb in group}
    assert {arguments[0] for arguments in READ_BY_HEAD} == verbs - {
        "serve",
        "stop",
        "verify",
        "repartition",
        *OF_CLUSTERS,
    }


@pytest.mark.parametrize("arguments", [["--debug", "plan", MISSING], ["plan", MISSING, "--debug"]], ids=" ".join)
def test_debug_shows_where_an_error_was_raised_before_its_line(arguments: list[str]) -> None:
    done = run(*arguments)
    told = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert told[0] == "Traceback (most recent call last):"
    assert told[-1] == f"gptj-dist: there is no directory {MISSING}"


def test_an_error_that_nothing_foresaw_is_a_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(arguments: list[str], standalone_mode: bool) -> None:  # noqa: ARG001
        raise (MemoryError if "much" in arguments else KeyError)("a\nb")

    monkeypatch.setattr(cli, "app", app)
    for arguments, told in (
        (["plan"], "gptj-dist: internal error: KeyError: 'a\\nb'; --debug shows where\n"),
        (["plan", "much"], "gptj-dist: there is not enough memory; --debug shows where\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["gptj-dist", *arguments])
        assert cli._call() == 1
        assert capsys.readouterr().err == told


def test_a_prompt_may_be_called_debug() -> None:
    assert cli._without_debug(["complete", "--debug", "--", "--debug"]) == (["complete", "--", "--debug"], True)
    assert cli._without_debug(["complete", "--", "--debug"]) == (["complete", "--", "--debug"], False)


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    """As if another Python were taken than the one that the packages were installed for."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "gptj_dist", "plan", "demo"],
        env=environment(PYTHONPATH=str(Path(cli.__file__).parents[2])),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("gptj-dist: the package typer is missing in ")
    assert done.stderr.count("\n") == 1
