"""`gptj-dist plan --devices cluster` against a Ray that runs."""

from __future__ import annotations

import pytest
import ray

from tests.http.server import local_ray
from tests.verbs import run_verb

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("name", ["cluster", "measured"])
def test_a_running_cluster_is_planned_for(name: str) -> None:
    with local_ray(num_cpus=2):
        address = ray.get_runtime_context().gcs_address
        (node,) = ray.nodes()
        done = run_verb("plan", "demo", "--devices", name, "--address", address, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    assert "gptj-dist serve demo --layers 28" in done.stdout
    if name == "measured":
        assert "stage 0: 28 layers on cpu of " in done.stdout
        assert f"--device cpu --stage-nodes ray.io/node-id={node['NodeID']} --dtype float32" in done.stdout
    else:
        assert "A 'cpu' is 2 cores" in done.stdout
