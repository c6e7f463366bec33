"""Standard streams that are closed, full, gone, of another encoding, or hold no text: one line, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gptj_dist import __version__
from tests.fake_server import FakeServer, Reply, events, fake_server
from tests.verbs import command_line, environment, run_verb

pytestmark = pytest.mark.slow

ANSWER = events({"choices": [{"index": 0, "text": " café 中", "finish_reason": None}]})
QUICK_VERBS = (["--help"], ["key", "--name", "alice"], ["complete", "Größe"])
VERBS = (["plan", "demo"], ["generate", "demo", "--prompt", "Größe", "--max-tokens", "2"], *QUICK_VERBS)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server(lambda call: ANSWER if call.json().get("stream") else Reply(body=_choice(" café 中"))) as server:
        yield server


def _choice(text: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text}]}


def _run(
    shell: str, *arguments: str | bytes, typed: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """A verb with the redirections that `shell` gives it."""
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command_line(), *arguments]
    return subprocess.run(
        command, input=typed, env=environment(**(env or {})), capture_output=True, timeout=60, check=False
    )


def _prompt(server: FakeServer) -> str:
    return str(server.calls[0].json()["prompt"])


def test_the_version_is_printed() -> None:
    assert run_verb("--version").stdout == f"gptj-dist {__version__}\n"


@pytest.mark.parametrize("verb", QUICK_VERBS, ids=" ".join)
def test_a_full_disk_under_standard_output_is_one_line(verb: list[str], server: FakeServer) -> None:
    done = _run(">/dev/full", *verb, env={"GPTJ_URL": server.base})
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, lines) == (1, ["gptj-dist: the output cannot be written: No space left on device"])


@pytest.mark.parametrize("verb", QUICK_VERBS, ids=" ".join)
def test_closed_streams_do_not_matter(verb: list[str], server: FakeServer) -> None:
    assert _run("<&- >&- 2>&-", *verb, env={"GPTJ_URL": server.base}).returncode == 0


ASCII_ALONE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    ("verb", "locale"),
    [
        *((verb, ASCII_ALONE) for verb in VERBS),
        *((VERBS[-1], locale) for locale in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"})),
    ],
    ids=str,
)
def test_what_the_output_encoding_lacks_is_escaped(verb: list[str], locale: dict[str, str], server: FakeServer) -> None:
    done = _run("", *verb, env={"GPTJ_URL": server.base, **locale})
    assert (done.returncode, done.stderr) == (0, b"")
    if verb[0] == "complete":
        assert done.stdout.decode("utf-8") in (" café 中\n", " caf\\xe9 \\u4e2d\n")
        assert _prompt(server) == "Größe"


def test_json_in_an_encoding_without_its_characters_is_still_json(server: FakeServer) -> None:
    done = _run("", "complete", "x", "--json", env={"GPTJ_URL": server.base, "PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout) == _choice(" café 中")


@pytest.mark.parametrize(
    ("typed", "prompt", "note", "locale"),
    [
        ("The café".encode()[:8], "The caf", "ends within a character: its last byte is dropped", {}),
        ("中".encode()[:2], "", "its last 2 bytes are dropped", {}),
        (b"caf\xe9 au lait", "caf� au lait", "U+FFFD replaces it in 1 places", {}),
        (b"caf\xe9 au lait", "caf� au lait", "U+FFFD replaces it in 1 places", {"LC_ALL": "C.UTF-8"}),
        (b"caf\xe9 au lait", "caf� au lait", "U+FFFD replaces it in 1 places", {"PYTHONIOENCODING": "ascii"}),
        ("\ufeffThe café\n".encode(), "The café", "", {}),
        ("a � b".encode(), "a � b", "", {}),
    ],
)
def test_bytes_of_a_pipe_that_are_no_text_are_replaced_with_a_note(
    typed: bytes, prompt: str, note: str, locale: dict[str, str], server: FakeServer
) -> None:
    done = _run("", "complete", typed=typed, env={"GPTJ_URL": server.base, **locale})
    assert (done.returncode, _prompt(server)) == (0, prompt)
    assert note in done.stderr.decode()
    assert len(done.stderr.splitlines()) == (1 if note else 0)


@pytest.mark.parametrize(
    ("typed", "form"),
    [("The café".encode("utf-16"), "UTF-16"), (b"\x1f\x8b\x08\x00abc", "gzip"), (b"PK\x03\x04", "zip")],
)
def test_a_pipe_of_another_form_is_refused_by_its_name(typed: bytes, form: str) -> None:
    done = _run("", "complete", typed=typed)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [f"gptj-dist: {done.stderr.decode().strip()[11:]}"]
    assert form in done.stderr.decode()


@pytest.mark.parametrize("verb", [["complete"], ["chat", "--message"]])
@pytest.mark.parametrize("locale", [{}, ASCII_ALONE])
def test_bytes_of_an_argument_that_are_no_text_are_replaced(
    verb: list[str], locale: dict[str, str], server: FakeServer
) -> None:
    done = _run("", *verb, b"caf\xe9", "--stop", b"\xff", env={"GPTJ_URL": server.base, **locale})
    assert b"Traceback" not in done.stderr
    assert b"U+FFFD" in done.stderr
    body = server.calls[0].json()
    assert "caf�" in (body.get("prompt"), body.get("messages", [{}])[-1].get("content"))
    assert body["stop"] == ["�"]


def test_lines_of_a_chat_that_are_no_text_are_replaced() -> None:
    piece = events({"choices": [{"delta": {"content": "yes"}, "finish_reason": None}]})
    with fake_server(lambda _: piece) as server:
        done = _run("", "chat", typed=b"caf\xe9\n", env={"GPTJ_URL": server.base})
    assert (done.returncode, done.stderr) == (0, b"")
    assert server.calls[0].json()["messages"] == [{"role": "user", "content": "caf�"}]


def test_a_directory_whose_name_is_no_utf8_is_read_and_written(tmp_path: Path) -> None:
    directory, copy = os.fsencode(tmp_path / "gpt") + b"\xe9", os.fsencode(tmp_path / "copy") + b"\xe9"
    verbs: list[list[str | bytes]] = [
        ["synth", "tiny", directory],
        ["inspect", directory],
        ["convert", directory, copy],
    ]
    for verb in verbs:
        done = _run("", *verb)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    assert os.path.isfile(copy + b"/config.json")  # noqa: PTH113


def test_a_tokenizer_is_written_as_utf8_whatever_the_locale(tmp_path: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = _run("", "synth", "tiny", str(tmp_path / "gptj"), env=locale)
    assert done.returncode == 0, done.stderr
    assert "\u0120" in (tmp_path / "gptj" / "merges.txt").read_text("utf-8")


@pytest.mark.parametrize(
    "arguments",
    [[b"\xff"], ["complete", "x", "--seed", b"\xff"], ["plan", b"\xff"], ["plan", "demo", "--devices", b"\xe9"]],
)
def test_an_argument_that_is_no_text_where_no_text_belongs_is_refused(arguments: list[str | bytes]) -> None:
    done = _run("", *arguments)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_standard_streams_are_those_of_the_process_after_a_closed_one_was_replaced() -> None:
    code = "from gptj_dist.cli.streams import prepare_streams as p; p(); import sys; print(sys.stdin.read() == '')"
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", code], capture_output=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == (b"True\n", b"")


def test_ctrl_c_while_the_last_of_the_output_waits_for_its_reader_is_no_traceback() -> None:
    code = (
        "import os, signal; from gptj_dist import cli; cli._call = lambda: 0; "
        "cli.flush_output = lambda: os.kill(os.getpid(), signal.SIGINT); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
