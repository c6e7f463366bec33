"""What a client sees before the first pipeline is there."""

from __future__ import annotations

import pytest

from tests.http.server import deploy, local_ray, serve_http
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


def test_ready_is_503_while_stages_load_and_health_is_200() -> None:
    with local_ray(), serve_http() as server:
        deploy({"model": "demo", "stages": 1, "device": "cpu"})
        wait_until(lambda: server.client.get("/health").status_code == 200, "the ingress is up")
        response = server.client.get("/ready")
        assert response.status_code == 503
        refused = server.client.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert "retry-after" in refused.headers
        looked = server.client.get("/debug/pipeline")
        assert (looked.status_code, looked.json()["error"]["code"]) == (503, "not_ready")
        counted = server.client.get("/metrics")
        assert counted.status_code == 200
        assert 'path="/ready",status="503"' in counted.text
        assert "gptj_dist_pipeline_up{" not in counted.text
        wait_until(server.is_ready, "the stages have loaded")
