"""Models from the hub, through the hub's own client, from a stand-in for the hub on loopback.

The client reads its settings when it is imported, so everything here runs in processes of its own.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event

import pytest

from gptj_dist.checkpoint.files import PICKLED, SAFETENSORS, WeightForm
from gptj_dist.checkpoint.hub import DEMO, resolve_model
from gptj_dist.checkpoint.index import expected_tensors, read_model_config
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import LayerRange, ModelConfig
from tests.hub_server import Hub, running_hub
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=40,
    num_layers=4,
    d_model=16,
    num_heads=2,
    rotary_dim=4,
    d_ff=64,
    context_length=32,
    eos_token_ids=(0,),
)
STAGES = (LayerRange(0, 2, 0, 3), LayerRange(1, 2, 3, 4))
METADATA = {"config.json", "tokenizer.json", "tokenizer_config.json"}
ROOT = Path(__file__).parents[2]
NAME = "owner/name"
TIMEOUT_S = 60


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The hub client's, with its cache."""
    return tmp_path / "home"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A repository with all its weights in one file of each framework."""
    directory = _repository(tmp_path / "single")
    write_checkpoint(directory, CONFIG)
    for file in ("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "rust_model.ot", "README.md"):
        (directory / file).write_bytes(file.encode())
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = _repository(tmp_path / "sharded")
    write_checkpoint(directory, CONFIG, max_shard_bytes=8192)
    return directory


def _repository(directory: Path) -> Path:
    directory.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model(DEMO) / file, directory)
    return directory


def _as_pickles(directory: Path) -> None:
    """Renames the shards to those of PyTorch. Nobody looks into them before they are loaded."""
    new_name = {old: f"pytorch_{Path(old).stem}.bin" for old in _shards(directory)}
    for old, new in new_name.items():
        (directory / old).rename(directory / new)
    weight_map = {name: new_name[file] for name, file in _weight_map(directory).items()}
    (directory / SAFETENSORS.index).unlink()
    (directory / PICKLED.index).write_text(json.dumps({"weight_map": weight_map}))


def _weight_map(directory: Path, form: WeightForm = SAFETENSORS) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((directory / form.index).read_text())["weight_map"]
    return weight_map


def _shards(directory: Path) -> list[str]:
    return sorted(set(_weight_map(directory).values()))


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gptj_dist", "download", *arguments]


def _run(hub: Hub, home: Path, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=hub.environment(home, **environment), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def _download(hub: Hub, home: Path, *arguments: str, **environment: str) -> Path:
    """Runs `gptj-dist download`, which must succeed; the directory that it names."""
    done = _run(hub, home, _command(NAME, *arguments), **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().rpartition(": ")[2])


def _refusal(hub: Hub, home: Path, *arguments: str, **environment: str) -> str:
    """Runs `gptj-dist download`, which must fail; the one line that it prints."""
    done = _run(hub, home, _command(*(arguments or (NAME,))), **environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Fetching")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("gptj-dist: cannot get")
    return lines[0]


def test_safetensors_are_fetched_where_there_are_any_and_no_other_frameworks_files(
    hub: Hub, home: Path, single: Path
) -> None:
    hub.add(NAME, single)

    directory = _download(hub, home)

    assert sorted(hub.downloads()) == sorted(METADATA | {"model.safetensors"})
    for file in hub.downloads():
        assert (directory / file).read_bytes() == (single / file).read_bytes()


def test_pickles_are_fetched_where_there_are_only_those(hub: Hub, home: Path, single: Path) -> None:
    (single / "model.safetensors").unlink()
    hub.add(NAME, single)

    _download(hub, home)

    assert set(hub.downloads()) == METADATA | {"pytorch_model.bin"}


def test_a_repository_without_either_is_refused_by_what_it_holds(hub: Hub, home: Path, single: Path) -> None:
    for file in ("model.safetensors", "pytorch_model.bin"):
        (single / file).unlink()
    hub.add(NAME, single)

    done = _run(hub, home, _command(NAME))

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "holds flax_model.msgpack, rust_model.ot, tf_model.h5: weights of " in done.stderr


def test_a_repository_of_an_adapter_is_called_what_it_is(hub: Hub, home: Path, tmp_path: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes(b"{}")
    hub.add(NAME, tmp_path)

    done = _run(hub, home, _command(NAME))

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "owner/name has no config.json; it holds a LoRA adapter" in done.stderr


def test_the_generation_config_is_fetched_with_the_other_small_files(hub: Hub, home: Path, single: Path) -> None:
    (single / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    hub.add(NAME, single)

    directory = _download(hub, home)

    assert read_model_config(directory).eos_token_ids == (0, 7)


def test_the_files_are_listed_once_and_what_is_there_is_not_asked_for_again(
    hub: Hub, home: Path, sharded: Path
) -> None:
    hub.add(NAME, sharded)
    _download(hub, home)
    assert [asked.path.startswith("/api") for asked in hub.asked].count(True) == 1
    assert len(hub.downloads()) == len(set(hub.downloads()))
    hub.asked.clear()

    _download(hub, home)

    assert hub.downloads() == []
    assert len(hub.asked) == 2  # where the branch points, and the files


def test_download_says_where_the_files_lie_and_their_bytes(hub: Hub, home: Path, single: Path) -> None:
    hub.add(NAME, single)

    done = _run(hub, home, _command(NAME))

    num_bytes = sum((single / file).stat().st_size for file in METADATA | {"model.safetensors"})
    assert f"4 files, {num_bytes:,} bytes" in done.stdout
    assert str(home / "hub" / "models--owner--name" / "snapshots") in done.stdout


@pytest.mark.parametrize("form", [SAFETENSORS, PICKLED])
def test_each_node_fetches_only_the_files_of_its_stage(
    hub: Hub, tmp_path: Path, sharded: Path, form: WeightForm
) -> None:
    if form is PICKLED:
        _as_pickles(sharded)
    hub.add(NAME, sharded)
    weight_map = _weight_map(sharded, form)
    fetched = []
    for layers in STAGES:
        hub.asked.clear()
        _download(hub, tmp_path / f"node-{layers.stage}", "--layers", "3,1", "--stage", str(layers.stage))
        fetched.append(set(hub.downloads()) - METADATA - {form.index})
        assert fetched[-1] == {weight_map[name] for name in expected_tensors(CONFIG, layers)}
        assert fetched[-1] < set(weight_map.values())
    assert fetched[0] | fetched[1] == set(weight_map.values())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--stage", "1"], "--stage needs --stages or --layers"),
        (["--stage", "2", "--stages", "2"], "there is no stage 2: of 2 stages the last is 1"),
        (["--layers", "3,3"], "add up to 6"),
    ],
)
def test_a_stage_that_is_not_there_is_refused_before_weights_are_fetched(
    hub: Hub, home: Path, single: Path, arguments: list[str], reason: str
) -> None:
    hub.add(NAME, single)

    done = _run(hub, home, _command(NAME, *arguments))

    assert done.returncode == 2
    assert reason in done.stderr
    assert set(hub.downloads()) <= METADATA


def test_after_a_cut_connection_only_the_rest_is_asked_for(hub: Hub, home: Path) -> None:
    demo = resolve_model(DEMO)
    size_bytes = (demo / "model.safetensors").stat().st_size
    hub.add(NAME, demo)
    hub.cuts["model.safetensors"] = [size_bytes - 1]

    directory = _download(hub, home)

    cut, rest = (asked for asked in hub.asked if asked.file == "model.safetensors" and asked.method == "GET")
    assert (cut.range, cut.num_bytes) == (None, size_bytes - 1)
    assert rest.range is not None
    assert rest.range != "bytes=0-"
    assert rest.range == f"bytes={size_bytes - rest.num_bytes}-"
    assert (directory / "model.safetensors").read_bytes() == (demo / "model.safetensors").read_bytes()


def test_a_connection_that_stays_cut_is_said_and_the_next_run_fetches_only_what_is_missing(
    hub: Hub, home: Path, sharded: Path
) -> None:
    hub.add(NAME, sharded)
    *complete, last = _shards(sharded)
    hub.cuts[last] = [0] * 6  # the client tries so often

    done = _run(hub, home, _command(NAME))

    assert done.returncode == 2
    assert f"{last} did not arrive" in done.stderr.splitlines()[-1]
    assert "run the same again" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert set(complete) < set(hub.downloads())
    hub.asked.clear()
    _download(hub, home)
    assert hub.downloads() == [last]


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_ended_in_mid_download_the_next_run_fetches_only_files_that_are_not_complete(
    hub: Hub, home: Path, sharded: Path, signal_number: signal.Signals, code: int
) -> None:
    hub.add(NAME, sharded)
    shards = _shards(sharded)
    gate = hub.gates[shards[1]] = Event()
    with subprocess.Popen(
        _command(NAME), env=hub.environment(home), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: shards[1] in hub.downloads(), "the second shard is on its way")
        process.send_signal(signal_number)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    gate.set()
    assert (process.returncode, output) == (code, "")
    if signal_number == signal.SIGINT:
        assert errors.splitlines()[-1].startswith("Stopped. Complete files are kept")
        assert "Traceback" not in errors
    hub.asked.clear()

    directory = _download(hub, home)

    assert hub.downloads() == shards[1:]
    assert all((directory / file).read_bytes() == (sharded / file).read_bytes() for file in shards)


def test_processes_that_want_the_same_file_at_once_download_it_once(hub: Hub, home: Path, single: Path) -> None:
    hub.add(NAME, single)
    gate = hub.gates["model.safetensors"] = Event()
    processes = [
        subprocess.Popen(_command(NAME), env=hub.environment(home), cwd=ROOT, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    wait_until(
        lambda: [(asked.method, asked.file) for asked in hub.asked].count(("HEAD", "model.safetensors")) == 2,
        "both want the weights",
    )
    gate.set()

    assert [process.wait(timeout=TIMEOUT_S) for process in processes] == [0, 0]
    assert hub.downloads().count("model.safetensors") == 1


def test_a_private_model_is_given_out_for_its_token_which_every_request_carries(
    hub: Hub, home: Path, single: Path
) -> None:
    hub.add(NAME, single).required_token = "hf_mine"

    _download(hub, home, HF_TOKEN="hf_mine")

    assert {asked.token for asked in hub.asked} == {"hf_mine"}


@pytest.mark.parametrize("token", ["", "hf_mine"])
def test_a_model_that_is_missing_or_private_is_refused_with_what_to_do(hub: Hub, home: Path, token: str) -> None:
    line = _refusal(hub, home, HF_TOKEN=token)

    assert "'owner/name'" in line
    assert "no such repository" in line
    assert "check the spelling" in line
    assert "HF_TOKEN" in line


@pytest.mark.parametrize("model", ["EleutherAI/gptj-6B", "Eleuther/gpt-j-6b"])
def test_a_misspelt_name_is_answered_with_the_one_that_was_meant(hub: Hub, home: Path, model: str) -> None:
    assert "did you mean 'EleutherAI/gpt-j-6b'?" in _refusal(hub, home, model)


def test_a_token_that_is_not_valid_is_named_as_the_reason(hub: Hub, home: Path, single: Path) -> None:
    hub.add(NAME, single)
    hub.refused_tokens.add("hf_old")

    line = _refusal(hub, home, HF_TOKEN="hf_old")

    assert "your token is not valid" in line
    assert "hf_old" not in line


@pytest.mark.parametrize("token", ["", "hf_mine"])
def test_a_gated_model_is_refused_with_where_to_ask(hub: Hub, home: Path, single: Path, token: str) -> None:
    hub.add(NAME, single).is_gated = True

    assert f"it is gated; ask for access at {hub.base}/owner/name" in _refusal(hub, home, HF_TOKEN=token)


def test_a_revision_that_is_missing_is_named(hub: Hub, home: Path, single: Path) -> None:
    hub.add(NAME, single)

    assert "no branch, tag or commit 'float61'" in _refusal(hub, home, NAME, "--revision", "float61")


def test_a_revision_is_fetched_by_the_name_of_its_branch(hub: Hub, home: Path, single: Path, sharded: Path) -> None:
    commit = hub.add(NAME, sharded).move("float16", single)

    assert _download(hub, home, "--revision", "float16").name == commit
    assert set(hub.downloads()) == METADATA | {"model.safetensors"}


def test_offline_a_model_in_the_cache_needs_no_hub(hub: Hub, home: Path, sharded: Path) -> None:
    hub.add(NAME, sharded)
    directory = _download(hub, home)
    hub.asked.clear()

    assert _download(hub, home, HF_HUB_OFFLINE="1") == directory
    assert hub.asked == []


def test_offline_the_file_that_is_not_in_the_cache_is_named(hub: Hub, home: Path, sharded: Path) -> None:
    hub.add(NAME, sharded)
    directory = _download(hub, home, "--layers", "3,1", "--stage", "0")
    missing = next(file for file in _shards(sharded) if not (directory / file).exists())
    hub.asked.clear()

    line = _refusal(hub, home, HF_HUB_OFFLINE="1")

    assert f"HF_HUB_OFFLINE is set, and {missing} is not in the cache {home / 'hub'}" in line
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    assert "tokenizer.json is not in the cache" in _refusal(hub, home, HF_HUB_OFFLINE="1")
    assert f"config.json is not in the cache {home / 'other' / 'hub'}" in _refusal(
        hub, home / "other", HF_HUB_OFFLINE="1"
    )
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_done_without_if_the_cache_holds_the_model(home: Path, sharded: Path) -> None:
    with running_hub() as hub:
        hub.add(NAME, sharded)
        directory = _download(hub, home)

    assert _download(hub, home) == directory


def test_too_small_a_disk_is_said_before_the_file_is_fetched(hub: Hub, home: Path, single: Path) -> None:
    hub.add(NAME, single)
    full = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9000, 8000, 1000)"
    code = f"{full}; import sys; sys.argv[1:] = ['download', '{NAME}']; from gptj_dist.cli import main; main()"

    done = _run(hub, home, [sys.executable, "-c", code])

    assert done.returncode == 2
    assert "Not enough free disk space" in done.stderr
    assert "set HF_HOME" in done.stderr
    assert done.stderr.count("\n") == 1
    assert hub.downloads() == ["config.json"]


DRAW_THEN_LOAD = f"""
from gptj_dist.config import PipelineConfig
from gptj_dist.stages.blueprint import draw_blueprint
from gptj_dist.stages.runner import StageRunner

blueprint = draw_blueprint(PipelineConfig({NAME!r}, layers=(3, 1)))
print("drawn", flush=True)
input()
for attempt in range(2):
    StageRunner(blueprint.stage_specs(["cpu"] * len(blueprint.layers))[1]).load("float32", 1, on_progress=print)
"""


def test_stages_load_and_tell_it_from_the_commit_that_was_drawn_even_if_the_branch_moves(
    hub: Hub, home: Path, sharded: Path, single: Path
) -> None:
    repository = hub.add(NAME, sharded)
    drawn = repository.branches["main"]
    weight_map = _weight_map(sharded)
    files = sorted({weight_map[name] for name in expected_tensors(CONFIG, STAGES[1])})
    with subprocess.Popen(
        [sys.executable, "-c", DRAW_THEN_LOAD],
        env=hub.environment(home),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "drawn\n"
        repository.move("main", single)
        hub.asked.clear()
        output, _ = process.communicate("\n", timeout=TIMEOUT_S)

    assert process.returncode == 0
    loaded = ["preparing code for this CPU", "1/1 layers"]
    assert output.splitlines() == [*(f"fetching {file}" for file in files), *loaded, *loaded]
    assert hub.downloads() == files
    assert all(drawn in asked.path for asked in hub.asked)
