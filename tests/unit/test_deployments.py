"""The files in `deployments/` and `cluster/` are what Ray takes them for, and hold only settings that exist."""

from __future__ import annotations

import copy
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
def test_a_misspelt_argument_is_refused_with_the_nearest_name(path: Path) -> None:
    args = read(path)["applications"][0]["args"] | {"stagse": 2}
    with pytest.raises(ConfigurationError, match=r"unknown setting 'stagse': did you mean 'stages'\?"):
        parse_settings(args)


def test_kuberay_serves_what_four_stage_serves_but_for_the_host() -> None:
    manifest = read(ROOT / "cluster" / "kuberay.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    served, expected = yaml.safe_load(manifest["spec"]["serveConfigV2"]), read(ROOT / "deployments" / "four-stage.yaml")
    assert served["http_options"].pop("host") == "0.0.0.0"
    assert expected["http_options"].pop("host") == "127.0.0.1"
    assert served == expected


def test_kuberay_has_a_pod_with_a_gpu_for_each_stage() -> None:
    spec = read(ROOT / "cluster" / "kuberay.yaml")["spec"]
    args = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"]
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == args["stages"]
    (container,) = group["template"]["spec"]["containers"]
    for resources in container["resources"].values():
        assert resources["nvidia.com/gpu"] == args["gpus_per_stage"]
        assert int(resources["cpu"]) > args["cpus_per_stage"]  # room for a coordinator


def test_kuberays_ray_is_the_one_that_is_tested() -> None:
    assert read(ROOT / "cluster" / "kuberay.yaml")["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__


def as_ray_up_reads_it(config: dict[str, Any]) -> dict[str, Any]:
    """The launcher config with Ray's defaults for AWS; raises what does not fit `ray/autoscaler/ray-schema.json`."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_the_launcher_config_is_of_rays_schema() -> None:
    config = read(ROOT / "cluster" / "ray-cluster.yaml")
    assert as_ray_up_reads_it(config)["head_node_type"] == "head"
    with pytest.raises(ValidationError, match="no_such_field"):
        as_ray_up_reads_it(config | {"no_such_field": 1})


def test_the_launcher_has_a_gpu_worker_for_each_stage_and_uses_the_tested_ray() -> None:
    config = read(ROOT / "cluster" / "ray-cluster.yaml")
    args = read(ROOT / "deployments" / "four-stage.yaml")["applications"][0]["args"]
    workers = config["available_node_types"]["gpu-worker"]
    assert workers["min_workers"] == workers["max_workers"] == config["max_workers"] == args["stages"]
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{ray.__version__}-py311-")
