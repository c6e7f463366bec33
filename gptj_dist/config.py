"""What is served and how: the model's shape and the pipeline's settings, checked once and frozen. Stdlib only.

Knows nothing of files, devices or Ray: `checkpoint` reads a `ModelConfig`, `stages` turns a `PipelineConfig` into
stages.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gptj_dist.errors import ConfigurationError, excerpt
from gptj_dist.field_types import type_problems
from gptj_dist.model_config import CONFIG_NAME as CONFIG_NAME
from gptj_dist.model_config import DTYPE_BYTES as DTYPE_BYTES
from gptj_dist.model_config import GENERATION_CONFIG_NAME as GENERATION_CONFIG_NAME
from gptj_dist.model_config import DTypeName as DTypeName
from gptj_dist.model_config import LayerRange as LayerRange
from gptj_dist.model_config import ModelConfig as ModelConfig
from gptj_dist.placement import ANY_NODE, check_nodes, parse_device
from gptj_dist.placement import DeviceChoice as DeviceChoice
from gptj_dist.placement import DeviceKind as DeviceKind
from gptj_dist.quantization import AUTO, NONE, parse_quantize

DTypeChoice = Literal["auto", DTypeName]
WireDType = Literal[DTypeName, "int8"]
WireChoice = Literal["same", "bfloat16", "float16", "int8"]

BLOCK_SIZE_TOKENS = 16
DEFAULT_MAX_BATCH_SIZE = 64
MAX_SPARES = 16
DEFAULT_MAX_QUEUED_REQUESTS = 1024
DEFAULT_MAX_QUEUED_TOKENS = 1_000_000
"""About what the largest body holds: 4 MB of English text."""

DEFAULT_CHAT_MAX_TOKENS = 512
DEFAULT_APP_NAME = "gptj-dist"
DEFAULT_DRAIN_S = 30.0
DEFAULT_WAKE_TIMEOUT_S = 120.0
DEFAULT_IDLE_S = 300.0
DEFAULT_SESSION_HEADER = "X-Session-Id"
_MAX_RESOURCE = 1_000_000
"""GB, CPUs or GPUs: more than any machine has."""


SERVER_SETTINGS = (
    *("cpus_per_stage", "gpus_per_stage", "max_queued_requests", "max_queued_tokens", "spares"),
    *("stage_nodes", "plan", "wire_dtype", "interface", "rebalance", "peer_files"),
)
"""Fields of `PipelineConfig` that have no effect in one process, without Ray and without other clients."""


@dataclass(frozen=True)
class PipelineConfig:
    """How one model is cut, placed and run: the settings shared by the command line, `LLM` and Serve configs.

    Args:
        model: `demo`, a directory in the Hugging Face layout, or a hub name.
        revision: branch, tag or commit on the hub.
        peer_files: nodes of a cluster that lack the model fetch what their stages need from the node on which the
            server was started. None: where the model is a directory; true: a hub model, too, which that node downloads.
        stages: number of stages; the planner cuts the layers by cost. None means as many as other settings name, or 1.
        layers: layers of each stage, first to last; overrides the planner.
        device: `auto` takes GPUs where there are any; `cpu,cuda` names one for each stage.
        stage_nodes: for each stage, its node's address, a label of it (`zone=b`), or `any`.
        plan: `auto` measures the devices of the cluster when a server starts, and chooses what the settings above leave
            open: number of stages, layers, devices and nodes. For one pipeline.
        interface: network interface, by name or address, on which a server's stages send to each other; None takes the
            one that Ray uses.
        dtype: `auto` takes the checkpoint's, unless the device is bad at it.
        wire_dtype: the type of hidden states between stages: `same` as they compute in, or a shorter one.
        quantize: `int8` or `int4` weights in place of those of that type, or the bits of stages: `0-1:int8,2:int4`.
            `none` makes numbers of that type of weights that another tool has quantised.
        threads_per_stage: the most threads of a CPU stage; None shares the cores available evenly.
        cpus_per_stage: the Ray CPUs of each stage; None fits the device.
        gpus_per_stage: the Ray GPUs of each stage on a GPU; None fits the cluster.
        max_model_len: the most tokens of prompt and output together; None is the model's context.
        kv_cache_gb: KV cache of the whole pipeline in 10**9 bytes; None (`auto`) takes what is free, less a margin.
        max_batch_size: the most requests that run at once; more wait.
        max_queued_requests: the most that wait in a server's pipeline; more are refused.
        max_queued_tokens: the most tokens of their prompts; a request that comes below may exceed it.
        spares: processes without weights that a server keeps on each node, to take the place of a stage that dies.
        rebalance: a server moves layers away from a stage that stays the slowest.
        max_chunk_tokens: the most prompt tokens in one micro-batch; None lets the scheduler choose.
        prefix_cache: a request begins with what the KV cache still holds of its first tokens.
        speculation: the next tokens of repetitive text are guessed, and several of them computed in one step.
        generation_config: `none` leaves the checkpoint's sampling defaults and suppressed tokens alone; its end tokens
            still end texts.

    Raises:
        ConfigurationError: a value is out of range, or two contradict each other.
    """

    model: str
    revision: str | None = None
    peer_files: bool | None = None
    stages: int | None = None
    layers: tuple[int, ...] | None = None
    device: str = "auto"
    stage_nodes: tuple[str, ...] | None = None
    plan: Literal["auto", "none"] = "none"
    interface: str | None = None
    dtype: DTypeChoice = "auto"
    wire_dtype: WireChoice = "same"
    quantize: str | None = None
    threads_per_stage: int | None = None
    cpus_per_stage: float | None = None
    gpus_per_stage: float | None = None
    max_model_len: int | None = None
    kv_cache_gb: float | None = None
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
    max_queued_requests: int = DEFAULT_MAX_QUEUED_REQUESTS
    max_queued_tokens: int = DEFAULT_MAX_QUEUED_TOKENS
    spares: int = 0
    rebalance: bool = False
    max_chunk_tokens: int | None = None
    prefix_cache: bool = True
    speculation: bool = True
    generation_config: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        for name, problem in type_problems(self):
            raise ConfigurationError(f"{name} {problem}")
        if not self.model:
            raise ConfigurationError("model must name a directory, a hub repository or 'demo'")
        _at_least_one("stages", self.stages)
        _at_least_one("layers", *(self.layers or ()))
        self._check_places()
        _at_least_one("threads_per_stage", self.threads_per_stage)
        _at_least_one("max_model_len", self.max_model_len)
        _at_least_one("max_batch_size", self.max_batch_size)
        _at_least_one("max_queued_requests", self.max_queued_requests)
        _at_least_one("max_queued_tokens", self.max_queued_tokens)
        _at_least_one("max_chunk_tokens", self.max_chunk_tokens)
        if self.dtype == "float32" and self.wire_dtype != "same":
            raise ConfigurationError(
                f"float32 is the exact mode, and wire_dtype {self.wire_dtype} would round between stages: leave out one"
            )
        if self.quantize not in (None, AUTO, NONE):
            parse_quantize(self.quantize)
        if not 0 <= self.spares <= MAX_SPARES:
            raise ConfigurationError(f"spares must be from 0 to {MAX_SPARES}, got {self.spares}")
        for name, value in (("kv_cache_gb", self.kv_cache_gb), ("cpus_per_stage", self.cpus_per_stage)):
            if value is not None and not 0 < value <= _MAX_RESOURCE:
                raise ConfigurationError(f"{name} must be positive and at most {_MAX_RESOURCE}, got {value:g}")
        if self.gpus_per_stage is not None and not 0 <= self.gpus_per_stage <= _MAX_RESOURCE:
            raise ConfigurationError(f"gpus_per_stage must be from 0 to {_MAX_RESOURCE}, got {self.gpus_per_stage:g}")
        if self.gpus_per_stage and set(self.devices) == {"cpu"}:
            raise ConfigurationError("gpus_per_stage is for stages on a GPU, but device is cpu: leave out one")

    def _check_places(self) -> None:
        """Checks what is said of single stages."""
        check_nodes(self.stage_nodes or ())
        named = {"layers": self.layers, "stage_nodes": self.stage_nodes, "device": parse_device(self.device)}
        if self.plan == "auto" and (self.layers is not None or self.stage_nodes is not None or "," in self.device):
            raise ConfigurationError(
                "plan auto chooses layers and nodes: leave out layers, stage_nodes, and lists of device"
            )
        lengths = {name: len(entries) for name, entries in named.items() if entries is not None}
        if lengths["device"] == 1:
            del lengths["device"]
        for name, length in lengths.items():
            if length == 0:
                raise ConfigurationError(f"{name} must name at least one stage")
            if length != self.num_stages:
                other = "stages" if self.stages is not None else next(iter(lengths))
                raise ConfigurationError(f"{name} names {length} stages, but {other} is {self.num_stages}")

    @property
    def num_stages(self) -> int:
        if self.stages is not None:
            return self.stages
        entries = self.layers if self.layers is not None else self.stage_nodes
        return len(parse_device(self.device)) if entries is None else len(entries)

    @property
    def devices(self) -> tuple[DeviceChoice, ...]:
        """Of each stage, first to last."""
        choices = parse_device(self.device)
        return choices * self.num_stages if len(choices) == 1 else choices

    @property
    def nodes(self) -> tuple[str, ...]:
        """Of each stage, first to last; see `stage_nodes`."""
        return self.stage_nodes or (ANY_NODE,) * self.num_stages


def _at_least_one(name: str, *values: int | None) -> None:
    for value in values:
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}")


def refuse_unknown_keys(given: Iterable[object], known: Iterable[str]) -> None:
    """Refuses a settings key that does not exist, and names the nearest one that does.

    Raises:
        ConfigurationError: `given` holds a key that `known` lacks.
    """
    known = sorted(known)
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key)[:100], known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
            raise ConfigurationError(f"unknown setting {excerpt(key)}: {hint}")
