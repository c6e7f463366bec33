"""`gptj-dist serve owner/name`: from a name on the hub to an answer."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.servers import free_port
from gptj_dist.checkpoint.hub import DEMO, resolve_model
from tests.http.command import running, wait_until_gone
from tests.hub_server import running_hub

pytestmark = pytest.mark.ray


def test_a_model_of_the_hub_is_fetched_once_before_ray_starts_and_then_served(tmp_path: Path) -> None:
    arguments = ["owner/name", "--revision", "float16", "--stages", "2", "--port", str(free_port())]
    with running_hub() as hub:
        hub.add("owner/name", tmp_path).move("float16", resolve_model(DEMO))
        with running([sys.executable, "-m", "gptj_dist", "serve", *arguments], hub.environment(tmp_path)) as command:
            base = command.wait_for(r"Ready after .* owner/name at (http://\S+)")
            output = command.output()
            body = {"prompt": "Call me", "max_tokens": 4, "temperature": 0}
            answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60).json()
            command.interrupt()
            wait_until_gone(command)
            assert command.process.returncode == 0
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["model"] == "owner/name"
    assert output.index("Fetching model.safetensors") < output.index("Starting Ray")
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(hub.downloads()) == files
