"""Every command and example of the README, the tutorial, the how-to pages and operations does what its page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

from benchmarks.servers import free_port
from tests.http.command import ROOT, STOP_LIMIT_S, Command, running
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

README = (ROOT / "README.md").read_text()
PAGES = [README, (ROOT / "docs/tutorial.md").read_text()]
PAGES += [page.read_text() for part in ("how-to", "operations") for page in sorted((ROOT / "docs" / part).glob("*.md"))]
ENVIRONMENT = Path(sys.prefix)
BIN = ENVIRONMENT / "bin"
DEFAULT_ADDRESS = "127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, each once. Indented blocks are for other machines, and are not executed."""
    found = (re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) for page in PAGES)
    return list(dict.fromkeys(chain.from_iterable(found)))


COMMANDS = list(dict.fromkeys(line for block in blocks("sh") for line in block.splitlines()))
CHECKPOINT_COMMANDS = [
    command
    for command in COMMANDS
    if "random-gptj" in command or command == "gptj-dist plan demo --devices examples/devices.yaml"
]
ASKING_COMMANDS = [command for command in COMMANDS if re.search(r"gptj-dist (status|complete|batch) ?", command)]
SERVE_COMMANDS = [command for command in COMMANDS if command.startswith("gptj-dist serve")]


def run(command: str, directory: Path = ROOT, **variables: str) -> str:
    """Runs a command line, in the repository if nowhere else; its standard output."""
    line = f'export PATH="{BIN}:$PATH"; {command}'
    environment = os.environ | variables
    return subprocess.run(
        line, shell=True, cwd=directory, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Command, str]]:
    """`make serve`, ready, on a free port."""
    assert "make serve" in COMMANDS
    port = free_port()
    with running(["make", "serve", f"PORT={port}", f"VENV={ENVIRONMENT}"]) as command:
        command.wait_for(r"(Ctrl-C stops)", timeout_s=300)
        yield command, f"127.0.0.1:{port}"
        command.interrupt()
        command.process.wait(timeout=STOP_LIMIT_S)
        wait_until(lambda: command.family() == [], "no process is left", STOP_LIMIT_S)


def test_make_serve_installs_nothing_the_second_time_and_prints_the_table(served: tuple[Command, str]) -> None:
    command, _ = served
    assert "pip" not in command.output()
    table = next(block for block in blocks("text") if "KV tokens" in block)
    for row in table.splitlines()[2:]:
        stage, *cells = re.split(r" {2,}", row.strip())
        printed = next(line for line in command.output().splitlines() if line.strip().startswith(f"{stage} "))
        assert cells[0] in printed  # the layers; memory depends on the machine


@pytest.mark.parametrize("curl", [command for command in COMMANDS if command.startswith("curl")])
def test_each_curl_line_answers(served: tuple[Command, str], curl: str) -> None:
    _, address = served
    assert '"choices"' in run(curl.replace("curl", "curl --silent --fail", 1).replace(DEFAULT_ADDRESS, address))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("gptj-dist top")])
def test_top_shows_the_stages_in_the_columns_of_the_readme(served: tuple[Command, str], command: str) -> None:
    _, address = served
    printed = run(f"{command} --url {address}")
    table = next(block for block in blocks("text") if "bubbles" in block)
    (header,) = [line for line in table.splitlines() if line.startswith("stage ")]
    (printed_header,) = [line for line in printed.splitlines() if line.startswith("stage ")]
    assert printed_header.split() == header.split()
    assert all(layers in printed and layers in table for layers in ("0-13", "14-27"))


def test_the_verbs_that_ask_a_server_do(served: tuple[Command, str], tmp_path: Path) -> None:
    _, address = served
    for name in ("examples", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    printed = {command: run(command, tmp_path, GPTJ_URL=address) for command in ASKING_COMMANDS}
    status = printed.pop("gptj-dist status")
    assert "ready" in status
    assert "14-27" in status
    for command, text in printed.items():
        assert text.startswith("3 requests answered") if "batch" in command else text.strip(), command
    assert {len((tmp_path / name).read_text().splitlines()) for name in ("answers.jsonl", "answers-here.jsonl")} == {3}


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_the_python_examples_run(served: tuple[Command, str], index: int) -> None:
    _, address = served
    code = blocks("python")[index].replace(DEFAULT_ADDRESS, address)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip()


def test_generate_prints_what_the_readme_shows() -> None:
    (command,) = [command for command in COMMANDS if command.startswith("gptj-dist generate")]
    (shown,) = re.findall(r"<!-- output of the command above -->\n```text\n(.*?)```", README, re.DOTALL)
    assert run(command) == shown


def test_what_comes_before_serving_works_in_the_order_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    outputs = [run(command, tmp_path) for command in CHECKPOINT_COMMANDS]

    assert [command.split()[1] for command in CHECKPOINT_COMMANDS] == [
        "synth",
        "inspect",
        "convert",
        "convert",
        "verify",
        "doctor",
        "plan",
    ]
    assert all(outputs)
    assert "Serving would work." in outputs[5]


def test_plan_shows_the_stages() -> None:
    (command,) = [command for command in COMMANDS if command.startswith("gptj-dist plan demo --stages")]
    assert "23-27 (5) + head" in run(command)


@pytest.mark.parametrize("command", SERVE_COMMANDS)
def test_each_way_to_serve_becomes_ready(command: str) -> None:
    arguments = [*command.replace("gptj-dist", "gptj_dist").split(), "--port", str(free_port())]
    with running([sys.executable, "-m", *arguments]) as started:
        started.wait_for(r"(Ready after)")


def test_the_make_targets_exist() -> None:
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert {"serve", "quick", "test", "bench", "docs"} == set(targets)
    for target in targets:
        run(f"make --dry-run {target}")


def test_every_command_is_covered() -> None:
    """Either by a test above, or by one of `test_deployments.py` that is named here."""
    elsewhere = {
        "serve run deployments/demo.yaml": "def test_serve_run_serves_the_demo_config_until_ctrl_c(",
        "serve build examples.bound_app:app": "def test_what_serve_build_writes_can_be_deployed(",
    }
    here: tuple[Callable[[str], bool], ...] = (
        lambda command: command.startswith(
            (". .venv", "make ", "curl ", "gptj-dist plan demo --stages", "gptj-dist generate", "gptj-dist top")
        ),
        SERVE_COMMANDS.__contains__,
        CHECKPOINT_COMMANDS.__contains__,
        ASKING_COMMANDS.__contains__,
    )
    for command in COMMANDS:
        if command in elsewhere:
            assert elsewhere[command] in (ROOT / "tests/http/test_deployments.py").read_text(), command
        else:
            assert any(covers(command) for covers in here), command
