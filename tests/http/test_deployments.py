"""What is in `deployments/` is deployed by Ray's own Serve, as `serve deploy` and `serve run` do it, and answers.

The cluster's GPUs are logical: the stages hold them in Ray's books and compute on the CPU.
"""

from __future__ import annotations

import copy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from benchmarks.servers import free_port
from gptj_dist.serving.sizing import COORDINATOR_CPUS
from gptj_dist.stages.actor_classes import ACTOR_NAME_PREFIX
from tests.http.server import Server, local_ray, serve_http
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deployments" / "demo.yaml"
OTHER_CONFIGS = sorted(set((ROOT / "deployments").glob("*.yaml")) - {DEMO})
NUM_CPUS = 16
SERVE = str(Path(sys.executable).with_name("serve"))
REQUEST = {"prompt": "The state of the Union is", "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=NUM_CPUS):
        yield


@pytest.fixture(scope="module")
def server(cluster: None) -> Iterator[Server]:  # noqa: ARG001
    with serve_http() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the demo model, which stands in for the one on the hub."""
    directory = tmp_path_factory.mktemp("models") / "gpt-j"
    with as_file(files("gptj_dist") / "demo") as demo:
        shutil.copytree(demo, directory)
    return str(directory)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def on_logical_resources(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The config with `model` for GPT-J-6B and CPUs to compute on; its CPUs and its strategy stay as they are."""
    logical = copy.deepcopy(dict(config))
    (app,) = logical["applications"]
    args = app["args"]
    args.pop("revision", None)
    args.pop("gpus_per_stage", None)
    args |= {"model": model, "device": "cpu", "dtype": "auto"}
    args |= {"max_model_len": 1024} if "max_model_len" in args else {}  # the demo's context
    return logical


@contextmanager
def deployed(config: Mapping[str, Any]) -> Iterator[None]:
    """A Serve config, deployed as the dashboard's REST API does it for `serve deploy`; removed in the end."""
    schema = ServeDeploySchema.model_validate(config)
    _get_global_client().deploy_apps(schema)
    try:
        yield
    finally:
        for app in schema.applications:
            serve.delete(app.name)
        wait_until(lambda: not placement_groups(), "no placement group is left")
        assert stage_actors() == {}


def placement_groups() -> list[dict[str, Any]]:
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def stage_actors() -> dict[str, Any]:
    """The stages of all pipelines by name, in the order of their names."""
    actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith(ACTOR_NAME_PREFIX)]
    return {
        actor["name"]: ray.get_actor(actor["name"], namespace=actor["namespace"])
        for actor in sorted(actors, key=lambda actor: str(actor["name"]))
    }


def held_resources(actor: Any) -> dict[str, float]:
    """What an actor holds of its placement group: `{"CPU_group_1_<id of the group>": 0.4, ...}`."""

    def look(_self: Any) -> dict[str, float]:
        held = ray._private.worker.global_worker.core_worker.resource_ids()
        return {name: sum(amount for _, amount in parts) for name, parts in held.items()}

    resources: dict[str, float] = ray.get(actor.__ray_call__.remote(look), timeout=30)
    return resources


def expected_bundle(args: Mapping[str, Any]) -> dict[str, float]:
    """What the file asks for each stage on a CPU; a CPU where it says nothing and there are plenty."""
    return {"CPU": float(args.get("cpus_per_stage", 1.0))}


def expected_strategy(app: Mapping[str, Any]) -> str:
    options = [option for option in app.get("deployments", []) if option["name"] == "Pipeline"]
    return str(options[0].get("placement_group_strategy", "PACK")) if options else "PACK"


@pytest.mark.usefixtures("cluster")
def test_serve_run_serves_the_demo_config_until_ctrl_c(tmp_path: Path) -> None:
    """Comes first: there is no Serve on the cluster yet, so this one listens at the port of its config."""
    config, port = read(DEMO), free_port()
    config["http_options"]["port"] = port
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [SERVE, "run", "--address", ray.get_runtime_context().gcs_address, str(path)]
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            server = Server(f"http://127.0.0.1:{port}", client)
            wait_until(lambda: server.is_ready() or process.poll() is not None, "`serve run` is ready")
            assert server.complete(**REQUEST)["usage"]["completion_tokens"] == 5, log.read_text()
            check_bundles(config)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0, log.read_text()
        finally:
            process.kill()
    wait_until(lambda: not placement_groups(), "no placement group is left")
    assert stage_actors() == {}


@pytest.mark.parametrize("path", OTHER_CONFIGS, ids=lambda path: path.stem)
def test_every_other_config_is_deployed_with_each_stage_in_its_own_bundle_and_answers(
    server: Server, model: str, path: Path
) -> None:
    config = on_logical_resources(read(path), model)
    with deployed(config):
        wait_until(server.is_ready, f"{path.name} is ready")
        assert server.complete(**REQUEST)["usage"]["completion_tokens"] == 5
        check_bundles(config)


def check_bundles(config: Mapping[str, Any]) -> None:
    """Each stage of the deployed config has a bundle of its own in the only placement group."""
    (app,) = config["applications"]
    num_stages, bundle = app["args"].get("stages", 1), expected_bundle(app["args"])
    (group,) = placement_groups()
    assert group["bundles"] == {0: {"CPU": COORDINATOR_CPUS}} | dict.fromkeys(range(1, num_stages + 1), bundle)
    assert group["strategy"] == expected_strategy(app)
    actors = stage_actors()
    assert [name.rpartition("/")[2] for name in actors] == [f"stage-{i}" for i in range(num_stages)]
    for index, actor in enumerate(actors.values(), start=1):
        held = held_resources(actor)
        group_id = group["placement_group_id"]
        assert {name: held[f"{name}_group_{index}_{group_id}"] for name in bundle} == bundle


def test_what_serve_build_writes_can_be_deployed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "built.yaml"
    subprocess.run([SERVE, "build", "examples.bound_app:app", "-o", str(path)], check=True, cwd=ROOT, timeout=60)
    config = read(path)
    with deployed(config):
        wait_until(server.is_ready, "the built config is ready")
        assert server.complete(**REQUEST)["usage"]["completion_tokens"] == 5


@pytest.mark.usefixtures("server")
def test_an_unknown_setting_fails_the_deployment_with_a_message_that_says_what_to_write() -> None:
    config = read(DEMO)
    args = config["applications"][0]["args"]
    args["stagse"] = args.pop("stages")
    with deployed(config):
        (message,) = wait_until(failures, "the deployment has failed")
        assert "unknown setting 'stagse': did you mean 'stages'?" in message
        assert placement_groups() == []


def failures() -> list[str]:
    """The messages of the applications that could not be deployed."""
    return [app.message for app in serve.status().applications.values() if app.status == "DEPLOY_FAILED"]
