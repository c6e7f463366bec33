"""What `make serve` installs, by a pip that answers as told; and which versions of Python it takes."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONGEST_MODULES

CLUSTER = Path(__file__).parents[2] / "cluster"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

FAKE_PIP = """
import json, os, pathlib, sys
answers = json.loads(os.environ["FAKE_PIP"])
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if "--dry-run" in sys.argv:
    if answers["requires"] is None:
        sys.exit("ERROR: No matching distribution found for torch")
    print(json.dumps({"install": [{"metadata": {"requires_dist": answers["requires"]}}]}))
elif not answers["installs"]:
    sys.exit("ERROR: no route to host")
"""


def run_install(
    tmp_path: Path, requires: list[str] | None, *options: str, installs: bool = True, has_gpu: bool = False
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The script, and the arguments of pip's calls. `requires` are torch's requirements; None is no torch at all."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")
    (tmp_path / "pip" / "__main__.py").write_text(FAKE_PIP)
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nexit {0 if has_gpu else 9}\n")
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "log"
    log.touch()
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PATH": f"{smi.parent}:{os.environ['PATH']}",
        "FAKE_PIP": json.dumps({"requires": requires, "installs": installs}),
        "FAKE_PIP_LOG": str(log),
    }
    command = [sys.executable, str(CLUSTER / "install_torch.py"), "2.13.0", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done, [json.loads(line) for line in log.read_text().splitlines()]


def test_a_cpu_build_in_the_configured_index_is_taken(tmp_path: Path) -> None:
    done, calls = run_install(tmp_path, ["filelock", "sympy"])
    assert done.returncode == 0
    assert calls[-1][-2:] == ["--quiet", "torch==2.13.0"]
    assert "installing the CPU build of torch 2.13.0 from the configured index" in done.stdout


@pytest.mark.parametrize("requires", [["nvidia-cublas-cu13==1", "cuda-bindings"], None])
def test_where_there_is_none_it_comes_from_pytorchs_index(tmp_path: Path, requires: list[str] | None) -> None:
    done, calls = run_install(tmp_path, requires)
    assert done.returncode == 0, done.stderr
    assert calls[-1][-3:] == ["--extra-index-url", CPU_INDEX, "torch==2.13.0+cpu"]
    assert f"installing it from {CPU_INDEX}" in done.stdout
    assert ("needs 2 CUDA packages" if requires else "No matching distribution") in done.stdout


def test_an_index_that_was_named_is_the_only_one(tmp_path: Path) -> None:
    done, calls = run_install(tmp_path, ["nvidia-cublas-cu13"], "--index-url", "http://mine")
    assert done.returncode != 0
    assert len(calls) == 1
    assert "--index-url http://mine has no CPU build of torch 2.13.0" in done.stderr


def test_an_index_that_cannot_be_reached_is_a_line_with_the_cure(tmp_path: Path) -> None:
    done, _ = run_install(tmp_path, ["nvidia-cublas-cu13"], installs=False)
    assert done.returncode != 0
    assert "torch==2.13.0+cpu could not be installed" in done.stderr
    assert "TORCH_INDEX=" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_machine_with_a_gpu_gets_what_pip_chooses(tmp_path: Path) -> None:
    done, calls = run_install(tmp_path, ["nvidia-cublas-cu13"], has_gpu=True)
    assert (done.returncode, calls) == (0, [])


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 9), (3, 13, 1)])
def test_a_supported_python_is_taken(version: tuple[int, ...]) -> None:
    assert runpy.run_path(str(CLUSTER / "require_python.py"))["refusal"](version) is None


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13), (3, 14, 0), (2, 7, 18)])
def test_another_python_is_named_as_the_reason(version: tuple[int, ...]) -> None:
    message = runpy.run_path(str(CLUSTER / "require_python.py"))["refusal"](version)
    assert f"Python {'.'.join(map(str, version))} at {sys.executable} is not supported" in message
    assert "3.11, 3.12 and 3.13" in message
    assert "CUDA" not in message


def test_an_old_python_can_read_why_it_is_refused() -> None:
    assert ast.parse((CLUSTER / "require_python.py").read_text(), feature_version=(3, 7)).body


def test_what_readme_names_outside_the_wheel_is_in_a_clone() -> None:
    pages = [CLUSTER.parent / "README.md", *sorted((CLUSTER.parent / "docs/how-to").glob("*.md"))]
    readme = "\n".join(page.read_text() for page in pages)
    named = set(re.findall(r"(?<![\w/])(?:examples|deployments|cluster)/[\w./-]+\w", readme))
    assert len(named) > 8
    assert [path for path in sorted(named) if not (CLUSTER.parent / path).exists()] == []
    assert "in the repository, as `examples/` and `benchmarks/` are, and not in the installed package" in " ".join(
        readme.split()
    )


def test_the_tests_that_the_threat_model_names_exist() -> None:
    text = (CLUSTER.parent / "docs" / "security.md").read_text()
    named = re.findall(r"`([a-z]+/test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 15
    for file, test in named:
        assert re.search(
            rf"^ *(?:async )?def {test or 'test_'}", (CLUSTER.parent / "tests" / file).read_text(), re.M
        ), test


def test_tests_that_start_ray_are_where_make_looks_for_them() -> None:
    tests = CLUSTER.parent / "tests"
    marked = {path.parent.name for path in tests.rglob("test_*.py") if re.search(r"mark\.ray\b", path.read_text())}
    assert marked == {"browser", "http", "ray"}


def test_all_tests_start_ray_where_make_looks_for_no_others() -> None:
    paths = [path for part in ("http", "ray") for path in (CLUSTER.parent / "tests" / part).glob("test_*.py")]
    assert len(paths) > 20
    assert [path.name for path in paths if not re.search(r"^pytestmark = .*mark\.ray\b", path.read_text(), re.M)] == []


def test_modules_that_are_said_to_take_longest_exist() -> None:
    assert set(LONGEST_MODULES) <= {path.stem for path in (CLUSTER.parent / "tests").rglob("test_*.py")}
