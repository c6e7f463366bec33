"""`gptj-dist doctor` on this machine, without Ray: the facts it gathers, what it prints and its exit codes."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.servers import free_port
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import expected_tensors, read_model_config
from gptj_dist.config import LayerRange
from gptj_dist.operate.doctor.facts import PACKAGES, gather_facts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


# Facts


def test_packages_are_those_that_the_project_needs() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(PACKAGES) == {re.split(r"[\[>=<]", requirement)[0] for requirement in needed}


def test_facts_of_this_machine_are_gathered_without_ray() -> None:
    code = (
        "import sys; from gptj_dist.operate.doctor.facts import gather_facts; gather_facts(None, None); "
        "from gptj_dist.operate.doctor import findings, fit, start; assert 'ray' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    gathered = gather_facts(None, None)
    assert gathered.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert gathered.cpu is not None
    assert 0 < gathered.cpu.free_bytes <= gathered.cpu.report.total_bytes
    assert gathered.max_open_files <= gathered.max_open_files_hard


# The command


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on this machine, whatever cluster the environment names."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"COLUMNS": "200"}
    command = [sys.executable, "-m", "gptj_dist", "doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_demo_would_be_served_here() -> None:
    done = doctor("demo", "--stages", "2", "--device", "cpu", "--port", str(free_port()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this machine" in done.stdout
    assert "demo: 28 layers of width 128 in 2 stages" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("Serving would work")


def test_without_a_model_the_memory_check_is_said_to_be_skipped() -> None:
    done = doctor("--port", str(free_port()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not checked: no MODEL was named" in done.stdout


def test_settings_without_a_model_are_refused() -> None:
    done = doctor("--stages", "2")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "gptj-dist: settings of a pipeline need a MODEL to go with them, such as 'demo'"
    ]


def test_a_port_in_use_fails_with_its_cure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = doctor("demo", "--device", "cpu", "--port", str(other.getsockname()[1]))
    assert done.returncode == 1
    assert "Address already in use" in done.stdout
    assert "cure: choose another --port" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("Serving would fail: 1 failure")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--kv-cache-gb", "100000"], "kv_cache_gb 100000.0 is room for"),
        (["demo", "--stages", "29"], "cannot cut 28 layers into 29 stages"),
        (["demo", "--cpus-per-stage", "500"], "each for 500 CPUs"),
        (["/no/such/model"], "there is no directory /no/such/model"),
    ],
)
def test_a_plan_that_cannot_work_here_fails_with_its_cure(arguments: list[str], message: str) -> None:
    done = doctor(*arguments, "--device", "cpu", "--port", str(free_port()))
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout
    assert "cure: " in done.stdout


def test_a_model_that_is_far_too_large_fails_without_being_loaded(tmp_path: Path) -> None:
    num_layers, d_model = 400, 16384
    write_sparse_checkpoint(tmp_path, num_layers, d_model)
    done = doctor(str(tmp_path), "--stages", "2", "--device", "cpu", "--port", str(free_port()))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "of weights in" in done.stdout
    assert "too much" in done.stdout


def test_a_broken_checkpoint_fails_with_the_checkpoints_own_error(tmp_path: Path) -> None:
    for file in resolve_model("demo").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 5_000_000 if "safetensors" in file.name else None])
    done = doctor(str(tmp_path), "--device", "cpu", "--port", str(free_port()))
    assert done.returncode == 1
    assert "model.safetensors is truncated or corrupt" in done.stdout.replace("\n", " ")


def write_sparse_checkpoint(directory: Path, num_layers: int, d_model: int) -> None:
    """The demo's tokenizer with a GPT-J of any size, whose weights are holes in a file."""
    demo = resolve_model("demo")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((demo / name).read_bytes())
    changes = {"n_layer": num_layers, "n_embd": d_model, "n_head": 64, "n_inner": None, "rotary_dim": 64}
    (directory / "config.json").write_text(json.dumps(json.loads((demo / "config.json").read_text()) | changes))
    model = read_model_config(directory)
    header, offset = {}, 0
    for name, shape in expected_tensors(model, LayerRange(0, 1, 0, num_layers)).items():
        num_bytes = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
