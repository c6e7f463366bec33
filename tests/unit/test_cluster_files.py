"""Images, the compose file and the Slurm script in `cluster/`: linters accept them, and their options exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import typer.main
import yaml
from packaging.requirements import Requirement

from gptj_dist.cli import app
from gptj_dist.config import PipelineConfig
from gptj_dist.serving.sizing import size_stages
from gptj_dist.stages.blueprint import draw_blueprint

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "cluster" / "docker"
SLURM = ROOT / "cluster" / "slurm" / "serve.sbatch"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
CONSTRAINTS = dict(
    line.split("==") for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
WRITTEN = [
    path
    for directory in ("cluster", "docs/operations", "docs/how-to")
    for path in sorted((ROOT / directory).rglob("*"))
    if path.is_file() and path.suffix in {"", ".md", ".py", ".sbatch", ".yaml", ".yml"}
]


def linted(linter: str, path: Path) -> str:
    """What a linter that is installed with the tests, or with the system, says of a file."""
    program = shutil.which(linter, path=str(Path(sys.executable).parent)) or shutil.which(linter)
    if program is None:
        pytest.skip(f"{linter} is not installed")
    return subprocess.run([program, str(path)], capture_output=True, text=True, check=False).stdout


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    assert linted("hadolint", DOCKER / "Dockerfile") == ""


def test_shellcheck_finds_nothing_in_the_slurm_script() -> None:
    assert linted("shellcheck", SLURM) == ""


def test_the_compose_specification_knows_every_field() -> None:
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(COMPOSE))  # with YAML's merges done
    misspelt = COMPOSE | {"services": {"head": SERVICES["head"] | {"helthcheck": {}}}}
    with pytest.raises(ValueError, match="helthcheck"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(misspelt))


def test_the_constraints_are_what_the_package_takes_and_what_is_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("\n]")[0]
    required = [Requirement(text) for text in re.findall(r'^    "(.+)",$', project, re.MULTILINE)]
    assert len(required) > 15
    for requirement in required:
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(CONSTRAINTS[name]), name
    assert version("ray") == CONSTRAINTS["ray"]
    assert f"TORCH_VERSION ?= {CONSTRAINTS['torch']}\n" in (ROOT / "Makefile").read_text()


def test_each_target_of_the_compose_file_and_the_pages_is_one_of_the_dockerfile() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    used = {target for path in WRITTEN for target in re.findall(r"docker build .*--target (\S+)", path.read_text())}
    assert used | {SERVICES["head"]["build"]["target"]} <= targets


def test_the_arguments_of_the_build_are_those_of_the_dockerfile() -> None:
    declared = set(re.findall(r"^ARG (\w+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    assert set(SERVICES["head"]["build"]["args"]) <= declared


def options(verb: str) -> set[str]:
    """The options of a verb of `gptj-dist`."""
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def calls(text: str) -> list[tuple[str, str]]:
    """Verb and arguments of each call of `gptj-dist` in a file, with its continued lines."""
    joined = re.sub(r"\\?\n +(?=-)", " ", text)
    return re.findall(r'(?:gptj-dist|\$program)"? ([a-z]+)((?: +(?:"[^"]*"|[^\s`|&;]+))*)', joined)


def test_every_option_of_every_call_exists() -> None:
    found = [(path, verb, arguments) for path in WRITTEN for verb, arguments in calls(path.read_text())]
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    checked = [(path, verb, arguments) for path, verb, arguments in found if verb in verbs]
    assert {path.name for path, verb, _ in checked if verb == "serve"} >= {"compose.yaml", "serve.sbatch"}
    for path, verb, arguments in checked:
        unknown = set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", arguments)) - options(verb)
        assert not unknown, f"{path}: gptj-dist {verb} has no {unknown}"


def ray_cpus(service: dict[str, Any]) -> int:
    """The default of a service's `--num-cpus`."""
    given = re.search(r"--num-cpus=(?:\$\{NODE_CPUS:-)?(\d+)", " ".join(service["command"]))
    assert given is not None
    return int(given[1])


def test_each_worker_has_room_for_one_stage_and_the_head_for_none() -> None:
    variables = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in environment("head").items()}
    config = PipelineConfig(
        model=variables["MODEL"], stages=2, device="cpu", cpus_per_stage=float(variables["STAGE_CPUS"])
    )
    size = size_stages(config, len(draw_blueprint(config).layers), lambda _: 0.0)
    coordinator, *stages = (bundle["CPU"] for bundle in size.bundles)
    workers = [ray_cpus(SERVICES[name]) for name in ("worker-1", "worker-2")]
    assert ray_cpus(SERVICES["head"]) == 0
    for cpus in workers:
        assert coordinator + stages[0] <= cpus < 2 * stages[0]


def environment(service: str) -> dict[str, str]:
    variables: dict[str, str] = SERVICES[service]["environment"]
    return variables


def test_ports_are_published_on_this_machine_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert "127.0.0.1:8000:8000" in published
    assert all(port.startswith("127.0.0.1:") for port in published)
