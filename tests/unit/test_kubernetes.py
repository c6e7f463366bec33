"""The manifests in `cluster/kubernetes/`, as kustomize builds them, are what KubeRay, Kubernetes and Serve take."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from kubernetes.client import V1PersistentVolumeClaim, V1PodTemplateSpec, V1ResourceRequirements
from ray.serve.schema import ServeDeploySchema

from gptj_dist.serving.app import build
from gptj_dist.serving.settings import parse_settings

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "cluster" / "kubernetes"
OVERLAYS = ["autoscale", "cpu", "cuda"]
KUBERAY = json.loads((ROOT / "tests" / "data" / "kuberay-1.7.json").read_text())

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the manifests")
every_overlay = pytest.mark.parametrize("service", OVERLAYS, indirect=True)


def built(overlay: str) -> dict[str, dict[str, Any]]:
    """The manifests that `kubectl apply -k` would send, by kind."""
    command = ["kubectl", "kustomize", str(KUBERNETES / overlay)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(output)}


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, dict[str, Any]]]:
    return {overlay: built(overlay) for overlay in OVERLAYS}


@pytest.fixture
def service(manifests: dict[str, dict[str, dict[str, Any]]], request: pytest.FixtureRequest) -> dict[str, Any]:
    return copy.deepcopy(manifests[request.param]["RayService"])


def cluster(service: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = service["spec"]["rayClusterConfig"]
    return config


def stages(service: dict[str, Any]) -> dict[str, Any]:
    """The group of pods that hold stages."""
    (group,) = cluster(service)["workerGroupSpecs"]
    return dict(group)


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return dict(only)


def groups(service: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster(service)["headGroupSpec"], stages(service)]


def serve_config(service: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def as_kubernetes_reads(kind: Any, content: dict[str, Any]) -> dict[str, Any]:
    """What is left of content when Kubernetes' client has read it: fields that it does not know are dropped."""
    read: dict[str, Any] = kind.from_dict(content).model_dump(by_alias=True, exclude_none=True, mode="json")
    return read


@every_overlay
def test_kuberay_knows_every_field(service: dict[str, Any]) -> None:
    jsonschema.validate(service, KUBERAY)
    misspelt = copy.deepcopy(service)
    stages(misspelt)  # there is one
    cluster(misspelt)["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(misspelt, KUBERAY)


@every_overlay
def test_kubernetes_knows_every_field_of_the_pods(service: dict[str, Any]) -> None:
    for group in groups(service):
        template = group["template"]
        assert as_kubernetes_reads(V1PodTemplateSpec, template) == template
        template["spec"]["containers"][0]["redinessProbe"] = {}
        assert as_kubernetes_reads(V1PodTemplateSpec, template) != template


def test_the_claim_and_the_resources_of_the_autoscaler_are_kubernetes_own(
    manifests: dict[str, dict[str, dict[str, Any]]],
) -> None:
    for of_overlay in manifests.values():
        claim = of_overlay["PersistentVolumeClaim"]
        assert as_kubernetes_reads(V1PersistentVolumeClaim, claim) == claim
    resources = cluster(manifests["autoscale"]["RayService"])["autoscalerOptions"]["resources"]
    assert as_kubernetes_reads(V1ResourceRequirements, resources) == resources


@every_overlay
def test_every_mount_has_a_volume_and_every_volume_a_mount(service: dict[str, Any]) -> None:
    for group in groups(service):
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container(group)["volumeMounts"]} == volumes


@every_overlay
def test_serve_and_our_settings_take_the_serve_config(service: dict[str, Any]) -> None:
    config = serve_config(service)
    schema = ServeDeploySchema.model_validate(config)
    assert schema.model_dump(exclude_unset=True, mode="json") == config
    (app,) = schema.applications
    assert app.import_path == f"{build.__module__}:{build.__name__}"
    assert parse_settings(app.args).pipeline.num_stages == 4


@every_overlay
def test_the_serve_config_is_read_with_keys_where_they_are_mounted(service: dict[str, Any], tmp_path: Path) -> None:
    """The line with `api_keys` is valid once it is no comment, and names a file in the mounted secret."""
    given = service["spec"]["serveConfigV2"].replace("# api_keys", "api_keys")
    (app,) = yaml.safe_load(given)["applications"]
    (mount,) = [mount for mount in container(stages(service))["volumeMounts"] if mount["name"] == "keys"]
    assert Path(app["args"]["api_keys"]).parent == Path(mount["mountPath"])
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [{"name": "probe", "sha256": "0" * 64}]}))
    assert len(parse_settings(app["args"] | {"api_keys": str(keys)}).api_keys) == 1


def test_cuda_serves_what_four_stage_serves_but_for_the_host(manifests: dict[str, dict[str, dict[str, Any]]]) -> None:
    served = serve_config(manifests["cuda"]["RayService"])
    expected = yaml.safe_load((ROOT / "deployments" / "four-stage.yaml").read_text())
    assert served["http_options"].pop("host") == "0.0.0.0"
    assert expected["http_options"].pop("host") == "127.0.0.1"
    assert served == expected


def test_autoscale_serves_what_cuda_serves_and_scales_as_our_own_example(
    manifests: dict[str, dict[str, dict[str, Any]]],
) -> None:
    scaled = serve_config(manifests["autoscale"]["RayService"])
    (options,) = scaled["applications"][0].pop("deployments")
    assert scaled == serve_config(manifests["cuda"]["RayService"])
    example = yaml.safe_load((ROOT / "deployments" / "autoscale.yaml").read_text())
    (expected,) = example["applications"][0]["deployments"]
    assert options["autoscaling_config"]["policy"] == expected["autoscaling_config"]["policy"]


@every_overlay
def test_each_stage_has_a_pod_with_room_for_it_and_for_a_coordinator(service: dict[str, Any]) -> None:
    (app,) = serve_config(service)["applications"]
    scaling = app["deployments"][0]["autoscaling_config"] if "deployments" in app else {"max_replicas": 1}
    group, args = stages(service), app["args"]
    assert group["replicas"] == group["minReplicas"] == args["stages"]
    assert group["maxReplicas"] == args["stages"] * scaling["max_replicas"]
    for resources in container(group)["resources"].values():
        assert int(resources.get("nvidia.com/gpu", 0)) == args.get("gpus_per_stage", 0)
        assert args["cpus_per_stage"] + 0.1 <= int(resources["cpu"])
        if args["device"] == "cpu":
            assert 2 * args["cpus_per_stage"] > int(resources["cpu"])  # no two stages in a pod


@every_overlay
def test_the_ports_are_serves_and_the_probe_asks_there(service: dict[str, Any]) -> None:
    port = serve_config(service)["http_options"]["port"]
    for group in groups(service):
        assert {"name": "serve", "containerPort": port} in container(group)["ports"]
    probe = container(stages(service))["readinessProbe"]
    assert f"http://127.0.0.1:{port}/ready" in probe["exec"]["command"][-1]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 30  # longer than a stage takes to come back
    assert "readinessProbe" not in container(cluster(service)["headGroupSpec"])  # Serve deploys to a ready head only


@every_overlay
def test_the_ray_is_the_tested_one_and_pipelines_publish_their_load_each_second(service: dict[str, Any]) -> None:
    assert cluster(service)["rayVersion"] == ray.__version__
    for group in groups(service):
        variables = {variable["name"]: variable.get("value") for variable in container(group)["env"]}
        assert variables["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] == "1"


@every_overlay
def test_the_pods_run_the_image_of_the_overlay_as_the_user_of_the_image(service: dict[str, Any]) -> None:
    dockerfile = (ROOT / "cluster" / "docker" / "Dockerfile").read_text()
    images = {container(group)["image"] for group in groups(service)}
    (image,) = images
    assert image.endswith("-cuda") == (serve_config(service)["applications"][0]["args"]["device"] == "cuda")
    for group in groups(service):
        user = group["template"]["spec"]["securityContext"]["runAsUser"]
        assert f"--uid {user} " in dockerfile
        paths = [mount["mountPath"] for mount in container(group)["volumeMounts"]]
        assert "/home/ray/.cache/huggingface" in paths
