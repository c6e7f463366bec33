"""The wheel is whole, and every supported Python that this machine has takes it.

`tests/http/test_cli_serve.py` serves from a wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.wheel import ROOT, build_wheel, install_wheel

IMPORT_ALL = """
import importlib, pathlib
root = pathlib.Path("installed").absolute()
paths = [path for part in PARTS for path in root.glob(part) if path.name != "yaml_files.py"]
names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
modules = [importlib.import_module(name.removesuffix(".__init__")) for name in names]
assert len(modules) > 40
assert all(pathlib.Path(module.__file__).is_relative_to(root) for module in modules)
"""
STDLIB_ONLY = ("gptj_dist/*.py", "gptj_dist/engine/*.py", "gptj_dist/planning/*.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_it_has_all_files_of_the_package_and_names_the_pythons(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "gptj_dist"], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    assert set(listed.stdout.splitlines()) <= held
    assert "gptj_dist/py.typed" in held
    assert {name.partition("/")[0] for name in held} == {"gptj_dist"}
    assert "\nRequires-Python: <3.14,>=3.11\n" in metadata


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_supported_python_takes_it_and_compiles_and_imports_it(wheel: Path, version: str, tmp_path: Path) -> None:
    """All of it is compiled; what needs no other package is imported."""
    python = _find(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    install_wheel(wheel, tmp_path / "installed", python)
    subprocess.run([python, "-m", "compileall", "-q", "installed"], cwd=tmp_path, timeout=120, check=True)
    code = f"PARTS = {STDLIB_ONLY}{IMPORT_ALL}"
    subprocess.run([python, "-S", "-c", code], cwd=tmp_path, env=_environment(), timeout=120, check=True)


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.14"])
def test_another_python_is_refused_in_a_line(version: str) -> None:
    python = _find(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    command = [python, "-m", "gptj_dist", "serve", "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"gptj-dist: Python {version}\.\d+ at {python} is not supported: .*\n", done.stderr)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": "installed", "PYTHONDONTWRITEBYTECODE": ""}


def _find(version: str) -> str | None:
    """The Python of this version, on the PATH or of pyenv."""
    found = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), shutil.which(f"python{version}")]
    return next((str(path) for path in found if path is not None), None)
