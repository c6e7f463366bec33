"""Facts about the machine that this process runs on. Imports no Ray, judges nothing, bears a broken torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gptj_dist
from gptj_dist.checkpoint.hub import local_directory
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import DeviceKind, ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.model.native.library import find_compiler
from gptj_dist.serving.sockets import why_not_listen
from gptj_dist.stages.blueprint import DeviceReport
from gptj_dist.stages.cores import available_cores

PACKAGES = (
    "ray", "torch", "tokenizers", "huggingface_hub", "pyzmq", "msgspec", "llguidance", "pydantic", "starlette",
    "uvicorn", "jinja2", "prometheus_client", "numpy", "typer", "rich", "httpx", "pyyaml", "grpcio",
)  # fmt: skip
"""What gptj-dist needs, as `pyproject.toml` has it: a package that is not installed by pip has no list to be read."""

_NVIDIA = Path("/proc/driver/nvidia")
_SHARED_MEMORY = Path("/dev/shm")
_UNLIMITED = 2**31
_WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class ModelQuestion:
    """What to look for on a node.

    Args:
        name: the model as the user gave it.
        commit: of a hub model; None for a directory, of which each node reads its own copy.
    """

    name: str
    commit: str | None


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A CPU with its memory, or a GPU."""

    kind: DeviceKind
    report: DeviceReport
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a node has of the model.

    Args:
        config: of a directory's model; None for a hub model, or where `error` says why there is none.
        cached_bytes: weights of a hub model that are in the node's cache.
    """

    config: ModelConfig | None = None
    error: str | None = None
    cached_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node, as a process on it finds it.

    Args:
        versions: as `installed_versions`.
        torch_cuda: the CUDA that torch was built for.
        torch_error: why it cannot be imported, or not use a GPU.
        driver: version of the NVIDIA driver.
        num_gpus: GPUs that the driver shows to this process, whether torch can use them or not.
        num_cpus: cores, as many as the affinity and the container's quota allow.
        devices: what torch sees, the CPU first; empty if it cannot even be imported.
        compiler: path of the C compiler that attention on the CPU is compiled with.
        max_open_files, max_open_files_hard: soft and hard limit of this process.
        hub_cache: where downloads go.
        listen_error: why nothing can listen at the address in question; None also if that was not asked.
        model: None if no model is in question.
    """

    host: str
    versions: Mapping[str, str | None]
    torch_cuda: str | None
    torch_error: str | None
    driver: str | None
    num_gpus: int
    num_cpus: float
    devices: tuple[DeviceFacts, ...]
    compiler: str | None
    max_open_files: int
    max_open_files_hard: int
    shm_total_bytes: int
    shm_free_bytes: int
    hub_cache: str
    hub_cache_free_bytes: int
    listen_error: str | None
    model: ModelFacts | None

    @property
    def cpu(self) -> DeviceFacts | None:
        """The CPU, if torch could be asked."""
        return next((device for device in self.devices if device.kind == "cpu"), None)

    @property
    def gpus(self) -> tuple[DeviceFacts, ...]:
        """The GPUs that torch sees, by their numbers."""
        return tuple(device for device in self.devices if device.kind == "cuda")


def gather_facts(question: ModelQuestion | None, listen_at: tuple[str, int] | None) -> NodeFacts:
    """Looks around on this machine. On GPUs it takes some memory for as long as this process lives.

    Args:
        listen_at: host and port to try; None tries none.
    """
    devices, torch_cuda, torch_error = _look_at_devices()
    soft, hard = (_UNLIMITED if n < 0 else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    shm = shutil.disk_usage(_SHARED_MEMORY) if _SHARED_MEMORY.exists() else None
    hub_cache = _hub_cache()
    return NodeFacts(
        host=socket.gethostname(),
        versions=installed_versions(),
        torch_cuda=torch_cuda,
        torch_error=torch_error,
        driver=_driver_version(),
        num_gpus=_num_driver_gpus(),
        num_cpus=float(available_cores()),
        devices=devices,
        compiler=find_compiler(),
        max_open_files=soft,
        max_open_files_hard=hard,
        shm_total_bytes=shm.total if shm else 0,
        shm_free_bytes=shm.free if shm else 0,
        hub_cache=str(hub_cache),
        hub_cache_free_bytes=_free_disk_bytes(hub_cache),
        listen_error=why_not_listen(*listen_at) if listen_at else None,
        model=_look_for_model(question) if question else None,
    )


def installed_versions() -> dict[str, str | None]:
    """Of `PACKAGES`, `python` and `gptj-dist`; None for what is not installed."""
    own = {"python": platform.python_version(), "gptj-dist": gptj_dist.__version__}
    return own | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _look_at_devices() -> tuple[tuple[DeviceFacts, ...], str | None, str | None]:
    """What torch sees, the CUDA that it was built for, and why it does not see more."""
    try:
        import torch

        from gptj_dist.stages.device import describe_device, free_bytes
    except (ImportError, OSError) as error:  # OSError: a library that torch is linked with is not there
        return (), None, f"torch cannot be imported: {_first_line(error)}"
    cpu = torch.device("cpu")
    found = [DeviceFacts("cpu", describe_device(cpu), free_bytes(cpu))]
    try:
        for gpu in [torch.device("cuda", i) for i in range(torch.cuda.device_count())]:
            found.append(DeviceFacts("cuda", describe_device(gpu), free_bytes(gpu)))
    except RuntimeError as error:
        return tuple(found), torch.version.cuda, _first_line(error)
    return tuple(found), torch.version.cuda, None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _driver_version() -> str | None:
    path = _NVIDIA / "version"
    match = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", path.read_text()) if path.exists() else None
    return match[1] if match else None


def _num_driver_gpus() -> int:
    """The driver's GPUs, less those that CUDA_VISIBLE_DEVICES hides."""
    num_gpus = sum(1 for _ in (_NVIDIA / "gpus").glob("*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return num_gpus if visible is None else min(num_gpus, len([part for part in visible.split(",") if part.strip()]))


def _hub_cache() -> Path:
    try:
        from huggingface_hub import constants
    except ImportError:
        return Path.home() / ".cache"
    return Path(constants.HF_HUB_CACHE)


def _free_disk_bytes(path: Path) -> int:
    """Free space where `path` is, or will be made."""
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def _look_for_model(question: ModelQuestion) -> ModelFacts:
    if question.commit is not None:
        return ModelFacts(cached_bytes=_cached_bytes(question.name, question.commit))
    directory = local_directory(question.name)
    if directory is None:
        return ModelFacts(error=f"there is no directory {question.name}")
    try:
        return ModelFacts(config=read_model_config(directory))
    except CheckpointError as error:
        return ModelFacts(error=str(error))


def _cached_bytes(repository: str, commit: str) -> int:
    """Bytes of the weight files of one commit that were downloaded already."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return 0
    config = try_to_load_from_cache(repository, "config.json", revision=commit)
    if not isinstance(config, str):
        return 0
    return sum(file.stat().st_size for pattern in _WEIGHT_FILES for file in Path(config).parent.glob(pattern))
