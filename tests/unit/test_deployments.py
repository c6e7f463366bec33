"""The files in `deployments/` and `cluster/launcher/` are what Ray takes them for; all settings in them exist."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import ValidationError
from ray._common.utils import import_attr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from gptj_dist.config import PipelineConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.serving.app import build
from gptj_dist.serving.settings import parse_settings
from gptj_dist.serving.sizing import COORDINATOR_CPUS, size_stages

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "deployments").glob("*.yaml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def test_the_five_configs_are_there() -> None:
    assert [path.stem for path in CONFIGS] == ["autoscale", "demo", "four-stage", "one-gpu", "two-node"]


@every_config
def test_serve_takes_the_config_and_it_builds_our_application(path: Path) -> None:
    config = ServeDeploySchema.model_validate(read(path))
    assert [app.name for app in config.applications] == ["gptj"]
    assert import_attr(config.applications[0].import_path) is build


@every_config
def test_serve_knows_every_field_of_the_config(path: Path) -> None:
    """Serve ignores some fields that it does not know; what it read must be what is written."""
    written = read(path)
    assert ServeDeploySchema.model_validate(written).model_dump(exclude_unset=True, mode="json") == written


@every_config
def test_the_config_listens_on_loopback_only(path: Path) -> None:
    assert ServeDeploySchema.model_validate(read(path)).http_options.host == "127.0.0.1"


@every_config
def test_the_arguments_are_settings(path: Path) -> None:
    args = read(path)["applications"][0]["args"]
    settings = parse_settings(args).pipeline
    assert isinstance(settings, PipelineConfig)
    assert (settings.model, settings.num_stages) == (args["model"], args.get("stages", 1))


@every_config
def test_each_stage_asks_for_what_the_config_says(path: Path) -> None:
    args = read(path)["applications"][0]["args"]
    size = size_stages(parse_settings(args).pipeline, args.get("stages", 1), {"CPU": 16.0, "GPU": 0.0}.__getitem__)
    gpus = {"GPU": args["gpus_per_stage"]} if args["device"] == "cuda" else {}
    bundle = {"CPU": args.get("cpus_per_stage", 1.0), **gpus}
    assert size.bundles == [{"CPU": COORDINATOR_CPUS}, *[bundle] * args.get("stages", 1)]


@every_config
def test_a_misspelt_argument_is_refused_with_the_nearest_name(path: Path) -> None:
    args = read(path)["applications"][0]["args"] | {"stagse": 2}
    with pytest.raises(ConfigurationError, match=r"unknown setting 'stagse': did you mean 'stages'\?"):
        parse_settings(args)


LAUNCHER = ROOT / "cluster" / "launcher"
every_launcher = pytest.mark.parametrize("name", ["aws", "gcp", "on-premises"])
CLOUDS = ["aws", "gcp"]


def as_ray_up_reads_it(config: dict[str, Any]) -> dict[str, Any]:
    """The launcher config with Ray's defaults for its provider; raises what does not fit Ray's `ray-schema.json`."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@every_launcher
def test_the_launcher_config_is_of_rays_schema(name: str) -> None:
    config = read(LAUNCHER / f"{name}.yaml")
    prepared = as_ray_up_reads_it(config)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    with pytest.raises(ValidationError, match="no_such_field"):
        as_ray_up_reads_it(config | {"no_such_field": 1})


@every_launcher
def test_the_launcher_starts_a_worker_for_each_stage_that_has_no_other_place(name: str) -> None:
    config = read(LAUNCHER / f"{name}.yaml")
    args = read(ROOT / "deployments" / "four-stage.yaml")["applications"][0]["args"]
    prepared = as_ray_up_reads_it(config)
    (workers,) = [
        kind for kind in prepared["available_node_types"].values() if kind.get("min_workers", 0) or name not in CLOUDS
    ]
    num_places = workers["min_workers"] + (0 if name in CLOUDS else 1)  # a head of your own has a stage, too
    assert num_places == args["stages"]
    assert workers["min_workers"] == workers["max_workers"] == config["max_workers"]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_has_a_gpu_worker_and_the_images_of_the_tested_ray(name: str) -> None:
    config = read(LAUNCHER / f"{name}.yaml")
    assert config["available_node_types"]["gpu-worker"]["min_workers"] == 4
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{ray.__version__}-py311-")


@every_launcher
def test_pipelines_publish_their_load_each_second_and_the_dashboard_is_on_loopback(name: str) -> None:
    config = read(LAUNCHER / f"{name}.yaml")
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S=1 " in commands[-1]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@every_launcher
def test_the_torch_that_is_installed_is_the_one_of_the_makefile(name: str) -> None:
    config = read(LAUNCHER / f"{name}.yaml")
    commands = " ".join(command for key in ("setup_commands", "head_setup_commands") for command in config.get(key, []))
    (version,) = re.findall(r"install_torch\.py (\S+)", commands)
    assert f"TORCH_VERSION ?= {version}\n" in (ROOT / "Makefile").read_text()
