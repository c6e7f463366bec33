"""The contenders of comparisons: engines in worker processes, and servers. All run the same cases.

A contender is written as a kind and its settings:

    ours stages=2 kv_cache_gb=2        our engine; settings of PipelineConfig, and package=/path/to/another/checkout
    vllm stages=2                      vLLM's engine; stages, bind=0|1, kv_cache_gb, and arguments of vLLM's LLM
    ct2 model=DIR compute_type=int8    CTranslate2's engine; DIR is the output of its converter
    openvino model=DIR backend=SDPA    OpenVINO GenAI's engine; DIR is an export of `optimum-cli`; backend SDPA or PA
    serve stages=2                     `gptj-dist serve`; its options, and package=
    vllm-serve                         vLLM's server; settings as for vllm
    http base=http://127.0.0.1:8000 model=demo     a server that runs already

`python=` of vllm, ct2 and openvino names the interpreter in whose environment the engine is installed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from benchmarks.cases import Case
from benchmarks.figures import Figures
from benchmarks.load import Target, closed_loop, failures, serving_figures
from benchmarks.processes import Family
from benchmarks.servers import free_port, running, serve_command, vllm_serve_command
from benchmarks.worker_process import ROOT, WorkerProcess

ENGINES = ("ours", "vllm", "ct2", "openvino")
KINDS = (*ENGINES, "serve", "vllm-serve", "http")
SERVED_NAME = "benchmark"
WARM_UP_TOKENS = 8
LEAST_REQUESTS = 8
COMPARED_OF_SERVERS = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2el_ms")


@dataclass(frozen=True, slots=True)
class Spec:
    """A contender as written on the command line."""

    text: str
    kind: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shared:
    """Settings that all contenders of a run share.

    Args:
        peer_python: the interpreter of vLLM's environment.
        most_requests: the largest batch of any case.
    """

    model: str
    dtype: str
    peer_python: str
    most_requests: int


class Contender(Protocol):
    """A loaded engine or server that can be measured repeatedly.

    Attributes:
        about: its description, for the document.
        family: its processes, which can be stopped between measurements.
    """

    about: dict[str, Any]
    family: Family

    def measure(self, case: Case, seed: int) -> Figures:
        """Runs the case once."""


def parse_spec(text: str) -> Spec:
    """Parses a contender as the module describes. Raises ValueError on anything else."""
    kind, *pairs = text.split()
    if kind not in KINDS or not all("=" in pair for pair in pairs):
        raise ValueError(f"{text!r} is not one of {', '.join(KINDS)} with settings such as stages=2")
    return Spec(text, kind, {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)})


class EngineContender:
    """An engine in a worker process."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self.about = worker.about
        self.family = worker.family

    def measure(self, case: Case, seed: int) -> Figures:
        """Runs the case with one token each and then whole, which gives separate rates of prefill and decode."""
        first = self._worker.ask({**case.as_json(), "output_len": 1, "seed": seed})
        figures = {"prefill_tokens_per_s": case.num_input_tokens / first["seconds"]}
        if case.batch == 1:
            figures["median_ttft_ms"] = 1000 * first["seconds"]
        if case.output_len == 1:
            return figures | _occupancy(first)
        total = self._worker.ask({**case.as_json(), "seed": seed + 1})
        decode_s = total["seconds"] - first["seconds"]
        figures["decode_tokens_per_s"] = case.batch * (case.output_len - 1) / decode_s
        figures["output_throughput"] = case.batch * case.output_len / total["seconds"]
        return figures | _occupancy(total)


class ServerContender:
    """A server under as many clients as the case has requests. Sends `LEAST_REQUESTS` or more.

    Begins with a request that is not measured, because a server that was stopped has to catch up.
    """

    def __init__(self, target: Target, family: Family, about: dict[str, Any]) -> None:
        self._target = target
        self.about = about
        self.family = family

    def measure(self, case: Case, seed: int) -> Figures:
        asyncio.run(closed_loop(self._target, Case(1, case.input_len, WARM_UP_TOKENS), 1, seed + 1))
        measured = asyncio.run(closed_loop(self._target, case, max(case.batch, LEAST_REQUESTS), seed))
        if broken := failures(measured):
            sys.exit(f"{self._target.base} failed: {broken}")
        figures = serving_figures(measured, {})
        return {name: figures[name] for name in COMPARED_OF_SERVERS}


@contextmanager
def opened(spec: Spec, shared: Shared) -> Iterator[Contender]:
    """Runs a contender until the context ends."""
    settings = dict(spec.settings)
    package = Path(settings.pop("package", ROOT))
    opening = _open_engine if spec.kind in ENGINES else _open_server
    with opening(spec.kind, settings, package, shared) as contender:
        yield contender


@contextmanager
def _open_engine(kind: str, settings: dict[str, Any], package: Path, shared: Shared) -> Iterator[Contender]:
    everywhere = {"model": shared.model, "dtype": shared.dtype}
    if kind == "ours":
        most = {"max_batch_size": max(shared.most_requests, 64)}
        worker = WorkerProcess("ours", everywhere | most | settings, package=package)
    else:
        python = Path(settings.pop("python", shared.peer_python)).absolute()
        worker = WorkerProcess(kind, everywhere | settings, python=str(python))
    with closing(worker):
        yield EngineContender(worker)


@contextmanager
def _open_server(kind: str, settings: dict[str, Any], package: Path, shared: Shared) -> Iterator[Contender]:
    family = Family()
    if kind == "http":
        target = Target(settings["base"], settings["model"])
        yield ServerContender(target, family, {"base": target.base})
        return
    port = free_port()
    settings |= {"served_model_name": SERVED_NAME, "dtype": shared.dtype}
    if kind == "serve":
        command, ready_path = serve_command(shared.model, settings, port), "/ready"
        environment = {**family.environment, "PYTHONPATH": str(package)}
    else:
        command, extra = vllm_serve_command(shared.peer_python, shared.model, settings, port)
        ready_path, environment = "/health", {**family.environment, **extra}
    with running(command, environment, port, ready_path, package) as (base, ready_s):
        about = {"seconds_to_ready": ready_s}
        yield ServerContender(Target(base, SERVED_NAME), family, about)


def _occupancy(answer: Mapping[str, Any]) -> dict[str, float]:
    """Cores that each stage's process used on average."""
    return {f"stage_{i}_cores": cpu_s / answer["seconds"] for i, cpu_s in enumerate(answer["stage_cpu_s"])}
