"""`gptj-dist plan` with devices and with --check, as a person runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from functools import partial
from multiprocessing import Pipe
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gptj_dist.cli import app
from gptj_dist.cli.server import plan_check
from gptj_dist.cli.server.plan_devices import devices_of_nodes
from gptj_dist.config import ModelConfig
from gptj_dist.errors import ConfigurationError, StageFailedError
from gptj_dist.operate import calibration
from gptj_dist.operate.calibration import check_pipeline
from gptj_dist.operate.launch.processes import descendants
from gptj_dist.planning.cost import Chunks
from gptj_dist.planning.devices import known_device
from gptj_dist.stages.stopwatch import Team, Timing
from tests.verbs import command_line, environment
from tests.waiting import wait_until

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "devices.yaml")
SIX_B = {
    "model_type": "gptj",
    "vocab_size": 50400,
    "n_layer": 28,
    "n_embd": 4096,
    "n_head": 16,
    "n_positions": 2048,
    "rotary_dim": 64,
    "dtype": "float16",
}


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "100", "RAY_ADDRESS": None})


@pytest.fixture
def six_b(tmp_path: Path) -> str:
    """GPT-J-6B's config.json: a plan for devices reads nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(SIX_B))
    return str(tmp_path)


def test_the_example_prints_stages_speed_and_the_command_to_serve(six_b: str) -> None:
    result = plan(six_b, "--devices", EXAMPLE)
    assert result.exit_code == 0, result.output
    stages = re.findall(r"^ \d .*?\((\d+)\)", result.output, re.MULTILINE)
    assert f"--layers {','.join(stages)} --dtype float16" in result.output
    assert sum(map(int, stages)) == 28
    for count in ("1 request", "8 requests", "32 requests", "64 requests"):
        assert count in result.output
    words = ("First token of 512", "limits the speed", "One more device", "Assumed", "The devices differ")
    assert [word for word in words if word not in result.output] == []
    assert max(len(line) for line in result.output.splitlines() if "gptj-dist serve" not in line) <= 100


def test_brackets_in_the_name_of_a_model_are_no_markup(tmp_path: Path) -> None:
    model = tmp_path / "gpt[j]"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SIX_B))
    result = plan(str(model), "--devices", EXAMPLE)
    assert f"gptj-dist serve {model} --layers" in result.output


def test_one_device_needs_no_order(six_b: str, tmp_path: Path) -> None:
    devices = tmp_path / "devices.yaml"
    devices.write_text("devices: [h200]")
    result = plan(six_b, "--devices", str(devices))
    assert "--layers 28 --dtype float16" in result.output
    assert "The devices differ" not in result.output


def test_a_type_that_a_device_is_bad_at_is_not_planned_for(six_b: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIX_B | {"dtype": "bfloat16"}))
    devices = tmp_path / "devices.yaml"
    devices.write_text("devices: [{name: t4, count: 4}]")
    assert "--dtype float32" in plan(six_b, "--devices", str(devices)).output
    assert "--dtype float16" in plan(six_b, "--devices", str(devices), "--dtype", "float16").output


@pytest.mark.parametrize(
    ("devices", "option"),
    [
        ("[{name: t4, count: 2, memory_gb: 4}]", "--quantize int4"),
        ("[{name: t4, memory_gb: 12}]", "--quantize int8"),
        ("[{name: t4, memory_gb: 3}, {name: rtx-3090, memory_gb: 7}]", "--quantize 0:int8,1:int4"),
        ("[h200]", "--dtype float16$"),
    ],
)
def test_auto_takes_as_many_bits_as_there_is_room_for(six_b: str, tmp_path: Path, devices: str, option: str) -> None:
    (tmp_path / "devices.yaml").write_text(f"devices: {devices}")
    output = plan(six_b, "--devices", str(tmp_path / "devices.yaml"), "--quantize", "auto").output
    assert re.search(option, output, re.MULTILINE), output
    assert ("Weights of fewer bits change what the model says" in output) == ("quantize" in option)


def test_bits_of_stages_do_not_go_with_devices(six_b: str) -> None:
    error = plan(six_b, "--devices", EXAMPLE, "--quantize", "0:int8").exception
    assert isinstance(error, ConfigurationError)
    assert "give --quantize int8, int4 or auto" in str(error)


def test_a_model_that_does_not_fit_shows_its_cut_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_dist.stages.device.free_bytes", lambda _device: 1e6)
    result = plan("demo", "--stages", "2")
    assert result.exit_code == 0, result.output
    assert "do not fit this machine" in result.output
    rows = [line.split() for line in result.output.splitlines() if re.match(r" [01] ", line)]
    assert [row[-2:] for row in rows] == [["-", "-"]] * 2


def test_a_cache_that_does_not_fit_is_an_error_and_no_table() -> None:
    result = plan("demo", "--kv-cache-gb", "900")
    assert isinstance(result.exception, ConfigurationError)
    assert "kv_cache_gb 900.0 is room for" in str(result.exception)
    assert result.output == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: [h20]", "did you mean 'h200'"),
        ("devices: [", "is not YAML"),
        ("devices: [{name: t4, cuont: 2}]", "did you mean 'count'"),
        ("devices: [rtx-3060]", "does not fit: .*What would help: .*1 more rtx-3060"),
    ],
)
def test_what_is_wrong_with_the_devices_is_said(six_b: str, tmp_path: Path, text: str, message: str) -> None:
    devices = tmp_path / "devices.yaml"
    devices.write_text(text)
    error = plan(six_b, "--devices", str(devices)).exception
    assert isinstance(error, ConfigurationError)
    assert re.search(message, str(error)), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache-gb", "nan"], "kv_cache_gb must be positive and at most 1000000, got nan"),
        (["--kv-cache-gb", "inf"], "kv_cache_gb must be positive and at most 1000000, got inf"),
        (["--kv-cache-gb=-1"], "kv_cache_gb must be positive and at most 1000000, got -1"),
        (["--kv-cache-gb", "1e300"], "kv_cache_gb must be positive and at most 1000000, got 1e+300"),
        (["--max-model-len=-1"], "max_model_len must be at least 1, got -1"),
        (["--devices", "h200"], "it takes a YAML file or 'cluster'"),
        (["--devices", "CLUSTER", "--address", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1"),
        (["--devices", "/nowhere.yaml"], "/nowhere.yaml cannot be read: No such file"),
        (["--devices", EXAMPLE, "--check"], "give one of them"),
        (["--devices", EXAMPLE, "--stages", "2", "--kv-cache-gb", "1"], "does not go with --stages, --kv-cache-gb"),
        (["--check", "--max-model-len", "9"], "does not go with --max-model-len"),
        (["--devices", EXAMPLE, "--max-model-len", "4096"], "exceeds the model's context of 2048"),
        (["--devices", "cluster", "--address", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(six_b: str, arguments: list[str], message: str) -> None:
    error = plan(six_b, *arguments).exception
    assert isinstance(error, ConfigurationError), error
    assert message in str(error)


# What Ray reports


def test_a_clusters_gpus_are_known_by_their_accelerator_type() -> None:
    nodes = [
        {"CPU": 8.0, "memory": 1e9},
        {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100-80G": 1.0},
        {"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0},
    ]
    assert [device.name for device in devices_of_nodes(nodes)] == ["a100-80", "a100-80", "t4"]


def test_a_cluster_without_gpus_is_one_of_cpus_with_its_own_memory() -> None:
    devices = devices_of_nodes([{"CPU": 4.0, "memory": 3e9}, {"CPU": 4.0, "memory": 5e9}])
    assert [(device.kind, device.memory_bytes) for device in devices] == [("cpu", 3e9), ("cpu", 5e9)]
    assert devices[0].bandwidth_bytes_s == known_device("cpu").bandwidth_bytes_s


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([{"GPU": 1.0}], "does not say of which type"),
        ([{"GPU": 1.0, "accelerator_type:ABACUS": 1.0}], "no figures are known for device 'abacus'"),
        ([{"memory": 1.0}], "neither a GPU nor a CPU"),
    ],
)
def test_a_cluster_that_cannot_be_planned_for_is_refused(nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        devices_of_nodes(nodes)


# Checks


@pytest.mark.slow
def test_check_prints_prediction_against_reality(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they agree depends on how quiet the machine is, so that is not tested: all else is."""
    small = ModelConfig(512, 2, 64, 2, 16, 256, 1024, (0,))
    monkeypatch.setattr(calibration, "CASES", calibration.CASES[:4])
    monkeypatch.setattr(plan_check, "check_pipeline", partial(check_pipeline, shapes=[small], num_rounds=1))
    result = plan("demo", "--check")
    ratios = re.findall(
        r"^ ([01]) .*?(?:decode|prompt chunk).* (\d+\.\d\d) +(\d+\.\d\d) +(\d+\.\d\d)", result.output, re.M
    )
    assert [stage for stage, *_ in ratios] == ["0"] * 4 + ["0"] * 4 + ["1"] * 4, result.output
    for _, predicted, measured, ratio in ratios:
        assert float(predicted) / float(measured) == pytest.approx(float(ratio), abs=0.02)
    is_off = any(abs(float(ratio) - 1) > 0.25 for *_, ratio in ratios)
    assert result.exit_code == is_off
    assert "of 12 predictions are within 25%" in result.output


def test_a_process_that_has_died_between_two_steps_ends_the_check_with_a_reason() -> None:
    """A broken pipe alone would end the command in silence, as if its output had no reader."""
    ours, theirs = Pipe()
    theirs.send(Timing(0.0, 0.0))
    team = Team([ours])
    theirs.close()
    with pytest.raises(StageFailedError, match="was there enough memory"):
        team.time(0, Chunks(1, 1, 1))


@pytest.mark.slow
def test_ctrl_c_ends_a_check_without_a_traceback_of_its_processes() -> None:
    with subprocess.Popen(
        command_line("plan", "demo", "--check"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    ) as command:
        try:
            wait_until(lambda: len(descendants(command.pid)) > 1, "a stage's process runs beside the resource tracker")
            os.killpg(command.pid, signal.SIGINT)
            _, errors = command.communicate(timeout=60)
            assert (command.returncode, errors) == (130, b"")
        finally:
            command.kill()


def test_a_rate_prints_each_way_to_make_pipelines_and_which_is_soonest(six_b: str, tmp_path: Path) -> None:
    devices = tmp_path / "devices.yaml"
    devices.write_text("devices: [{name: l4, count: 4}]")
    lengths = ("--prompt-tokens", "16", "--output-tokens", "4")
    result = plan(six_b, "--devices", str(devices), "--rate", "5", *lengths)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^ (\d+) +(\d) +\d+ .* (?:stages|queue)", result.output, re.MULTILINE)
    assert [(int(pipelines), int(stages)) for pipelines, stages in rows] == [(1, 4), (2, 2), (4, 1)]
    assert "In 99 of 100 requests the first token comes soonest from" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "5"], "name them with --devices"),
        (["--devices", EXAMPLE, "--rate", "5", "--stages", "2"], "does not go with --stages"),
        (["--devices", EXAMPLE, "--rate", "5", "--output-tokens", "4000"], "exceed the longest request, 2048 tokens"),
    ],
)
def test_a_rate_without_devices_or_with_a_cut_is_refused(six_b: str, arguments: list[str], message: str) -> None:
    result = plan(six_b, *arguments)
    assert result.exit_code != 0
    assert message in f"{result.output}{result.exception}"
