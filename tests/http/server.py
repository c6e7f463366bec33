"""A real Ray Serve for test modules, on a free port of loopback. Modules share one Ray until the session ends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.servers import free_port
from gptj_dist.operate.launch.local_ray import omit_unused_processes
from gptj_dist.serving.http.listener import Address
from gptj_dist.serving.pipeline import PipelineStatus
from tests.waiting import wait_until

APP_NAME = "under-test"


@dataclass(frozen=True)
class Server:
    """A Serve that listens at `base`.

    Args:
        base: URL without a path.
        client: a client for short requests.
        listen: address at which the ingress listens itself; None if Serve's proxy listens.
    """

    base: str
    client: httpx.Client
    listen: Address | None = None

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The body of a completion that must succeed."""
        response = self.client.post("/v1/completions", json=fields)
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def is_ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def status(self) -> PipelineStatus:
        """The status of one of the pipelines."""
        from ray import serve

        status: PipelineStatus = serve.get_deployment_handle("Pipeline", APP_NAME).status.remote().result(timeout_s=30)
        return status

    def wait_until_idle(self) -> None:
        """Waits until no request holds a KV block."""
        wait_until(lambda: self.status().num_used_blocks == 0, "no KV block is in use", timeout_s=20)


@dataclass
class SharedRay:
    """The Ray and the Serve of this process. Consecutive modules with the same settings share them.

    Attributes:
        resources: logical CPUs and GPUs of the running Ray; None if none runs.
        listen: address of the proxy of the running Serve; None without a proxy.
        is_serving: whether a Serve runs.
        environment: the variables of a process that joins this Ray.
    """

    resources: tuple[int, int] | None = None
    listen: Address | None = None
    is_serving: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def require(self, num_cpus: int, num_gpus: int) -> None:
        """Starts a local Ray with these logical resources, unless it runs."""
        import ray

        if self.resources == (num_cpus, num_gpus) and ray.is_initialized():
            return
        self.stop()
        omit_unused_processes()
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        self.resources = (num_cpus, num_gpus)

    def require_serve(self, has_proxy: bool) -> None:
        """Starts a Serve, unless one of this kind runs."""
        from ray import serve
        from ray.serve.config import HTTPOptions

        if self.is_serving and has_proxy == (self.listen is not None):
            return
        self.stop_serve()
        if has_proxy:
            self.listen = Address("127.0.0.1", free_port())
            serve.start(http_options=HTTPOptions(host=self.listen.host, port=self.listen.port))
        else:
            serve.start(proxy_location="Disabled")
        self.is_serving = True

    def stop_serve(self) -> None:
        """Stops Serve, if it runs."""
        from ray import serve

        if self.is_serving:
            serve.shutdown()
        self.listen, self.is_serving = None, False

    def stop(self) -> None:
        """Stops Serve and Ray, if they run."""
        import ray

        if self.resources is not None:
            self.stop_serve()
            ray.shutdown()
        self.resources, self.environment = None, {}


SHARED = SharedRay()


@contextmanager
def local_ray(num_cpus: int = 8, num_gpus: int = 0) -> Iterator[None]:
    """Provides a Ray cluster of one node with logical resources. It may outlive the context, for the next module.

    Variables that Ray sets, such as its token for processes that join, are in the environment within the context only.
    """
    before = dict(os.environ)
    os.environ.update(SHARED.environment)
    try:
        SHARED.require(num_cpus, num_gpus)
        SHARED.environment = dict(os.environ)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def serve_http(has_proxy: bool = True, api_key: str | None = None) -> Iterator[Server]:
    """Provides a Serve on the connected Ray, without an application. The client sends the key."""
    from ray import serve

    SHARED.require_serve(has_proxy)
    listen = SHARED.listen or Address("127.0.0.1", free_port())
    base = f"http://{listen.host}:{listen.port}"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with httpx.Client(base_url=base, timeout=60, headers=headers) as client:
            yield Server(base, client, None if has_proxy else listen)
    finally:
        for name in serve.status().applications:
            serve.delete(name)


@contextmanager
def serving(
    args: Mapping[str, Any],
    scaling: Mapping[str, Any] | None = None,
    num_cpus: int = 8,
    has_proxy: bool = False,
    api_key: str | None = None,
) -> Iterator[Server]:
    """Provides a ready application with these settings. The client sends the key."""
    with local_ray(num_cpus), serve_http(has_proxy, api_key) as server:
        deploy(args, scaling, server.listen)
        wait_until(server.is_ready, "the server is ready", timeout_s=180)
        yield server


def deploy(args: Mapping[str, Any], scaling: Mapping[str, Any] | None = None, listen: Address | None = None) -> None:
    """Deploys the application without waiting for it."""
    from ray import serve

    from gptj_dist.serving.app import make_application
    from gptj_dist.serving.settings import parse_settings

    options = {
        **(scaling or {"num_replicas": 1}),
        "graceful_shutdown_timeout_s": 5,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    application = make_application(parse_settings(args), options, listen)
    serve.run_many(
        [serve.RunTarget(application, name=APP_NAME)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
