"""`gptj-dist stop --address`: an application whose launcher is gone is removed from a Ray that runs on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import ray
from ray import serve

from tests.http.server import APP_NAME, Server, serving
from tests.verbs import run_verb

pytestmark = pytest.mark.ray


@pytest.fixture
def server() -> Iterator[Server]:
    with serving({"model": "demo", "device": "cpu"}) as server:
        yield server


def stop(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_verb("stop", "--address", ray.get_runtime_context().gcs_address, *arguments)


def test_an_application_is_removed_by_its_name_and_the_cluster_stays(server: Server) -> None:
    wrong = stop("--name", "another")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"gptj-dist: the cluster serves no application 'another'; it serves {APP_NAME}\n"
    assert server.is_ready()
    done = stop("--name", APP_NAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Removed the application {APP_NAME!r} from the cluster at ")
    assert not server.is_ready()
    assert APP_NAME not in serve.status().applications
    assert any(node["Alive"] for node in ray.nodes())
    again = stop("--name", APP_NAME)
    assert (again.returncode, again.stderr) == (2, f"gptj-dist: the cluster serves no application {APP_NAME!r}\n")
