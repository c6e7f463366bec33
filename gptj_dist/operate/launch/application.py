"""Deploys, watches and removes the Serve application on the connected Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from gptj_dist import errors
from gptj_dist.errors import ConfigurationError, GPTJDistError, StageFailedError
from gptj_dist.operate.launch.cluster import applications_served, http_address, stop_limit_s
from gptj_dist.operate.launch.settings import Launch

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from gptj_dist.serving.pipeline import PipelineStatus

NUM_ATTEMPTS = 1
"""Serve would load a model that does not fit several times over before it says so."""

ANSWER_MARGIN_S = 10.0
"""What Ray may take for an answer beyond the time of the work itself."""

REMOVAL_POLL_S = 0.5

T = TypeVar("T")


class RayGoneError(GPTJDistError):
    """Ray does not answer any more."""


class Served:
    """An application that is ready.

    Its handles are made once: where Serve finds its controller dead, making another one would start a new Ray.

    Attributes:
        pipelines: a handle to its deployment of pipelines.
    """

    def __init__(self, name: str) -> None:
        from ray import serve

        self.name = name
        self.pipelines: DeploymentHandle = serve.get_deployment_handle("Pipeline", name)
        self._ingresses: DeploymentHandle = serve.get_deployment_handle("Ingress", name)

    def statuses(self) -> list[PipelineStatus]:
        """What each pipeline reports; one that does not answer is left out.

        Raises:
            RayGoneError: Ray does not answer.
        """
        from gptj_dist.serving.pipeline import PipelineStatus

        replies = within(2 * ANSWER_MARGIN_S, self._ask_pipelines)
        return [reply for reply in replies if isinstance(reply, PipelineStatus)]

    def finish_requests(self, drain_s: float) -> int:
        """Makes all ingresses refuse new requests and finish running ones.

        Returns:
            The number of requests that exceeded the time limit and were cut.

        Raises:
            RayGoneError: Ray does not answer.
        """

        def finish() -> int:
            late = self._ingresses.broadcast("finish", drain_s)
            return sum(late.results(timeout_s=drain_s + ANSWER_MARGIN_S))

        return within(drain_s + 2 * ANSWER_MARGIN_S, finish)

    def _ask_pipelines(self) -> list[object]:
        from ray.serve.exceptions import RayServeException

        try:
            return list(self.pipelines.broadcast("status").results(timeout_s=ANSWER_MARGIN_S, return_exceptions=True))
        except (RayServeException, TimeoutError):  # there is no pipeline now, or a busy one
            return []


def deploy(launch: Launch, console: Console) -> str:
    """Gives the application to Serve without waiting for it. Returns the URL at which this machine reaches it.

    Raises:
        ConfigurationError: there is no room for it, its name or route is taken, or its settings are invalid.
    """
    from ray import serve
    from ray.exceptions import RayTaskError
    from ray.serve.config import HTTPOptions

    from gptj_dist.serving.app import make_application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    launch = _planned(launch, console)
    is_local = launch.address is None
    if is_local:
        _require_room(launch)
    scaling = {**launch.scaling, "max_constructor_retry_count": NUM_ATTEMPTS}
    application = make_application(launch.app, scaling, launch.listen if is_local else None)
    if is_local:
        serve.start(proxy_location="Disabled")
        place = (launch.listen.host, launch.listen.port)
    else:
        _require_no_other(launch, console)
        listen = launch.listen
        serve.start(
            http_options=HTTPOptions(host=listen.host, port=listen.port, keep_alive_timeout_s=listen.keep_alive_s)
        )
        place = http_address()
        launch.require_key_at(place[0])
    target = serve.RunTarget(application, name=launch.name, route_prefix=launch.route_prefix)
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except RayTaskError as error:
        raise ConfigurationError(f"Serve refuses the application: {error.cause}") from None
    return _base(launch, *place)


def _planned(launch: Launch, console: Console) -> Launch:
    """The launch with the cut and the nodes that the planner chooses, which it prints, if it is asked to.

    Raises:
        ConfigurationError: there would be several pipelines, or no plan is possible.
    """
    if launch.app.pipeline.plan != "auto":
        return launch
    from gptj_dist.operate.cluster.store import measured_links
    from gptj_dist.serving.auto_plan import plan_on_cluster

    if launch.scaling.get("num_replicas") != 1:
        raise ConfigurationError("--plan auto is for one pipeline; give the settings that it prints to several")
    plan = plan_on_cluster(launch.app.pipeline, measured_links())
    for line in plan.lines:
        console.print(line, soft_wrap=True)
    return replace(launch, app=replace(launch.app, pipeline=plan.config))


def failure_of(name: str) -> GPTJDistError | None:
    """Why the application cannot start, or None if it may."""
    from ray import serve

    application = serve.status().applications.get(name)
    if application is None or application.status != "DEPLOY_FAILED":
        return None
    return failure_in([deployment.message for deployment in application.deployments.values()] + [application.message])


def failure_in(messages: list[str]) -> GPTJDistError:
    """The error in Serve's messages: one of ours as it was raised in the replica, or the last line that names one."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        path, _, message = line.partition(": ")
        kind = vars(errors).get(path.rpartition(".")[2])
        if message and isinstance(kind, type) and issubclass(kind, GPTJDistError):
            return kind(message)
    named = [line for line in lines if "Error" in line]
    return StageFailedError(f"the pipelines cannot start: {(named or lines or ['Serve gives no reason'])[-1]}")


def is_served(name: str) -> bool:
    """Whether the cluster has the application.

    Raises:
        RayGoneError: Ray does not answer.
    """
    return name in (within(2 * ANSWER_MARGIN_S, applications_served) or ())


def remove(name: str) -> None:
    """Removes the application from the cluster, and returns when it is gone.

    An ingress that an update or a drained node has replaced may still have requests. `finish_requests` does not reach
    it: it gives them `drain_s` from now on.

    Raises:
        RayGoneError: Ray does not answer.
        StageFailedError: requests still run when that time is over, and a little.
    """
    if not is_served(name):
        return
    limit_s = within(2 * ANSWER_MARGIN_S, lambda: _begin_removal(name)) + 2 * ANSWER_MARGIN_S
    deadline_s = time.monotonic() + limit_s
    while is_served(name):
        if time.monotonic() > deadline_s:
            raise StageFailedError(
                f"requests of the application {name!r} still run after {limit_s:g} s; Serve removes it when they end"
            )
        time.sleep(REMOVAL_POLL_S)


def _begin_removal(name: str) -> float:
    """Returns how long requests that run may take."""
    from ray import serve

    limit_s = stop_limit_s(name)
    serve.delete(name, _blocking=False)  # else it fails after a minute
    return limit_s


def within(limit_s: float, work: Callable[[], T]) -> T:
    """Returns the result of `work`, with a time limit: Ray itself may wait a minute for a process that is gone.

    Raises:
        RayGoneError: it took longer than `limit_s`, or Ray failed.
    """
    outcome: list[T] = []
    problem: list[Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            problem.append(error)

    thread = threading.Thread(target=run, name="ask Ray", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not outcome:
        reason = str(problem[0]).partition("\n")[0] if problem else f"no answer for {limit_s:.0f} s"
        raise RayGoneError(f"Ray does not answer: {reason}") from (problem[0] if problem else None)
    return outcome[0]


def _base(launch: Launch, host: str, port: int) -> str:
    """The URL at which this machine reaches the application."""
    scheme = "http" if launch.listen.tls_cert is None else "https"
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{reachable}:{port}{launch.route_prefix.rstrip('/')}"


def _require_room(launch: Launch) -> None:
    """Raises ConfigurationError if this machine has too few CPUs or GPUs: a local Ray does not grow."""
    import ray

    from gptj_dist.serving.app import size_pipeline

    least = launch.scaling.get("autoscaling_config", {}).get("min_replicas", launch.scaling.get("num_replicas", 1))
    scale = max(1, least)
    size, available = size_pipeline(launch.app.pipeline), ray.cluster_resources()
    for resource, amount in size.total.items():
        wanted = scale * amount
        if wanted > available.get(resource, 0.0):
            raise ConfigurationError(
                f"{scale} pipeline(s) of {len(size.stages)} stages ask Ray for {wanted:g} {resource}s, this machine "
                f"has {available.get(resource, 0.0):g}; try --{resource.lower()}s-per-stage"
            )


def _require_no_other(launch: Launch, console: Console) -> None:
    """On a cluster that runs Serve, says whose address counts. Raises ConfigurationError if the name is taken."""
    if (applications := applications_served()) is None:
        return
    if launch.name in applications:
        raise ConfigurationError(
            f"the cluster at {launch.address} already serves an application {launch.name!r}; another --name and "
            "--route-prefix make room for this one beside it, and `gptj-dist stop` removes one whose launcher is gone"
        )
    console.print("Serve runs on this cluster already: its host and port are used, not --host and --port.")
