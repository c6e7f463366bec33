"""Plans a pipeline from its settings: reads the model's config, cuts its layers, chooses the type they compute in.

A blueprint is drawn before any process starts, so that a wrong setting or a broken checkpoint is reported at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gptj_dist.checkpoint.hub import DEMO, local_directory, resolve_model
from gptj_dist.checkpoint.index import check_checkpoint, read_model_config
from gptj_dist.config import (
    BLOCK_SIZE_TOKENS,
    DTYPE_BYTES,
    DeviceKind,
    DTypeName,
    LayerRange,
    ModelConfig,
    PipelineConfig,
    WireChoice,
)
from gptj_dist.engine.drafts import MAX_DRAFTS
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.generation import NO_GENERATION_CONFIG
from gptj_dist.planning.cost import weight_bytes
from gptj_dist.planning.partition import explicit_partition, layer_ranges, plan_partition
from gptj_dist.quantization import AUTO, NONE, Quantization, stage_bits
from gptj_dist.stages.files import FileSource
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.token_rules import TokenRules

logger = logging.getLogger(__name__)

WEIGHTS_SHARE = 0.8
"""What `auto` gives the weights of all memory before it takes a shorter type."""


@dataclass(frozen=True, slots=True)
class StageSpec:
    """Everything that a stage needs to load.

    Args:
        model: the user's name or path; each node resolves it to its own copy.
        revision: for a hub model, the commit, so that all stages load the same one even if the branch moves.
        rules: which tokens the last stage may sample.
        wire: the type of the hidden states that it sends.
        interface: see `PipelineConfig`.
        source: a node that has the model's files; None if the stage's own machine or the hub has.
    """

    model: str
    revision: str | None
    config: ModelConfig
    layers: LayerRange
    device: DeviceKind
    max_model_len: int
    max_batch_size: int
    rules: TokenRules
    wire: WireChoice = "same"
    interface: str | None = None
    source: FileSource | None = None


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """The device of a stage.

    Args:
        name: readable name, such as `cpu` or `NVIDIA T4`.
        memory_pool: stages with equal pools share one memory.
        num_cores: CPU cores of the machine.
        total_bytes: size of the memory, used or free.
        fast_dtypes: types that the device computes fast.
        kernels, vectors: names from `model.arithmetic`; stages with equal names compute equal bits in float32.
    """

    name: str
    memory_pool: str
    num_cores: int
    total_bytes: int
    fast_dtypes: tuple[DTypeName, ...]
    kernels: str = ""
    vectors: str = ""

    @property
    def host(self) -> str:
        """The name of the machine."""
        return self.memory_pool.partition("/")[0]


@dataclass(frozen=True, slots=True)
class StageReport:
    """A loaded stage.

    Args:
        quantized: the bits of its weights, such as `int4`; None if they have the type `dtype`.
        free_bytes: free memory of its memory pool after loading.
        kv_bytes_per_token: bytes of KV cache per token on this stage.
        pid: id of its process on the machine that `device.memory_pool` names.
        has_blocks: requests can share KV blocks.
    """

    layers: LayerRange
    device: DeviceReport
    kind: DeviceKind
    dtype: DTypeName
    weight_bytes: int
    free_bytes: int
    kv_bytes_per_token: int
    pid: int
    has_blocks: bool = True
    quantized: str | None = None


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A planned pipeline: checked, but not yet placed.

    Args:
        config: the settings; the revision of a hub model is a commit.
        source: a node that has the model's files; None if each node finds them itself.
    """

    config: PipelineConfig
    model: ModelConfig
    layers: tuple[LayerRange, ...]
    max_model_len: int
    rules: TokenRules
    source: FileSource | None = None

    def stage_specs(self, devices: Sequence[DeviceKind]) -> tuple[StageSpec, ...]:
        """The stages on these devices, first to last."""
        return tuple(
            StageSpec(
                model=self.config.model,
                revision=self.config.revision,
                config=self.model,
                layers=layers,
                device=device,
                max_model_len=self.max_model_len,
                max_batch_size=self.config.max_batch_size,
                rules=self.rules,
                wire=self.config.wire_dtype,
                interface=self.config.interface,
                source=self.source,
            )
            for layers, device in zip(self.layers, devices, strict=True)
        )


def draw_blueprint(config: PipelineConfig, source: FileSource | None = None) -> Blueprint:
    """Checks the settings against the model, and cuts it.

    Args:
        source: a node that has the model's files, where the stages' nodes may lack them.

    Raises:
        CheckpointError: the model's files are missing or broken, or the model is not a GPT-J.
        ConfigurationError: the settings do not suit the model.
    """
    directory = resolve_model(config.model, config.revision)
    model = read_model_config(directory)
    if config.generation_config == "none":
        model = replace(model, generation=NO_GENERATION_CONFIG)
    tokenizer = Tokenizer.load(directory)
    if local_directory(config.model) is not None:
        check_checkpoint(directory, model)
        if config.model != DEMO:  # processes of a cluster have other working directories
            config = replace(config, model=str(directory))
    else:  # each stage fetches and checks its own files
        config = replace(config, revision=directory.name)
    if config.layers is not None:
        layers = explicit_partition(model, config.layers)
    else:
        even = plan_partition(model, config.num_stages)
        layers = plan_partition(quantized_model(model, config, even), config.num_stages)
    max_model_len = config.max_model_len or model.context_length
    if max_model_len > model.context_length:
        raise ConfigurationError(f"max_model_len {max_model_len} exceeds the model's context of {model.context_length}")
    model = quantized_model(model, config, layers)
    return Blueprint(config, model, layer_ranges(layers), max_model_len, _token_rules(model, tokenizer), source)


def quantized_model(model: ModelConfig, config: PipelineConfig, layers: Sequence[int]) -> ModelConfig:
    """The model with the weights that the settings want.

    Args:
        layers: of each stage.

    Raises:
        ConfigurationError: the settings want other bits than the checkpoint has, name a stage that is not there, or
            leave the choice to the planner.
    """
    if config.quantize is None:
        return model
    if config.quantize == AUTO:
        raise ConfigurationError(
            "quantize auto is for `gptj-dist plan --devices`, which says what to give here, such as int8"
        )
    stored = model.quantization
    if config.quantize == NONE and (stored is None or stored.is_foreign):
        return replace(model, quantization=None)
    if config.quantize != NONE:
        wanted = Quantization.of_stages(layers, stage_bits(config.quantize, len(layers)))
        if stored is None or (stored.is_foreign and stored.layer_bits != wanted.layer_bits):
            return model.quantized(wanted)
        if stored.is_foreign or stored == replace(wanted, is_stored=True):
            return model
    has = stored and stored.name(0, model.num_layers)
    raise ConfigurationError(f"{config.model} has {has} weights, which cannot become others: leave out quantize")


def _token_rules(model: ModelConfig, tokenizer: Tokenizer) -> TokenRules:
    return TokenRules(
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        spare_ids=tuple(tokenizer.spare_ids(model.vocab_size)),
        suppressed_ids=model.generation.suppressed_ids,
        first_suppressed_ids=model.generation.first_suppressed_ids,
        bad_words=model.generation.bad_words,
    )


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    """Stages that are ready to compute.

    Args:
        num_blocks: KV blocks, the same number on every stage.
    """

    blueprint: Blueprint
    reports: tuple[StageReport, ...]
    num_blocks: int

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * BLOCK_SIZE_TOKENS

    def make_scheduler(self) -> Scheduler:
        """An idle scheduler of the pipeline's size."""
        config = self.blueprint.config
        return Scheduler(
            SchedulerConfig(
                num_stages=len(self.reports),
                num_blocks=self.num_blocks,
                block_size=BLOCK_SIZE_TOKENS,
                max_batch_size=config.max_batch_size,
                eos_token_ids=self.blueprint.rules.eos_token_ids,
                max_chunk_tokens=config.max_chunk_tokens,
                shares_memory=len({report.device.memory_pool for report in self.reports}) < len(self.reports),
                can_share_blocks=all(report.has_blocks for report in self.reports),
                keeps_prefixes=config.prefix_cache,
                max_drafts=MAX_DRAFTS if config.speculation else 0,
            )
        )

    def limits(self) -> EngineLimits:
        """The limits that requests are checked against."""
        blueprint = self.blueprint
        return EngineLimits(
            blueprint.rules,
            blueprint.max_model_len,
            self.num_kv_tokens,
            blueprint.model.num_layers,
            blueprint.config.max_batch_size,
        )


def choose_dtype(config: PipelineConfig, model: ModelConfig, devices: Sequence[DeviceReport]) -> DTypeName:
    """The type that all stages compute in.

    `auto` takes the checkpoint's type if every device computes it fast, else float32, which represents every value of
    the other two. If the memory of all devices together is too small for float32, it takes a 16-bit type that all
    compute fast. Total memory counts, not free memory, so that every pipeline and every restart chooses the same type.
    """
    if config.dtype != "auto":
        return config.dtype
    fast = [dtype for dtype in DTYPE_BYTES if all(dtype in device.fast_dtypes for device in devices)]
    lossless: DTypeName = model.dtype if model.dtype in fast else "float32"
    shorter = [dtype for dtype in fast if DTYPE_BYTES[dtype] < DTYPE_BYTES[lossless]]
    room_bytes = WEIGHTS_SHARE * sum({device.memory_pool: device.total_bytes for device in devices}.values())
    whole_model = LayerRange.whole(model.num_layers)
    return next((d for d in (lossless, *shorter) if weight_bytes(model, whole_model, d) <= room_bytes), lossless)


def quantized_name(model: ModelConfig, layers: LayerRange) -> str | None:
    """The bits of a stage's weights, such as `int4`; None if they are not quantised."""
    return None if model.quantization is None else model.quantization.name(layers.start, layers.stop)


def is_lossless(model: ModelConfig, dtype: DTypeName) -> bool:
    """Whether the type represents every value of the checkpoint exactly."""
    return dtype in (model.dtype, "float32")


def require_equal_bits(config: PipelineConfig, dtype: DTypeName, devices: Sequence[DeviceReport]) -> None:
    """Refuses a float32 pipeline whose stages would compute different bits, because float32 is the exact mode.

    Different CPUs, and CPUs beside GPUs, are refused only if the user chose float32. If `auto` chose it, they are only
    logged as a warning.

    Args:
        devices: of each stage, first to last.

    Raises:
        ConfigurationError: two stages differ; the message names them and what to do.
    """
    if dtype != "float32":
        return
    first = devices[0]
    for index, other in enumerate(devices):
        has_unlike_kinds = "cpu" in config.devices and len(set(config.devices)) > 1
        if has_unlike_kinds and config.dtype == "float32":
            raise ConfigurationError(
                f"in float32 all stages must compute the same bits, but stages are on CPUs and GPUs ({config.device}); "
                "serve with --dtype auto, bfloat16 or float16"
            )
        if other.kernels != first.kernels and not has_unlike_kinds:
            raise ConfigurationError(
                f"in float32 all stages must compute the same bits, but stage 0 on {first.host} has {first.kernels} "
                f"and stage {index} on {other.host} has {other.kernels}; install a C compiler (gcc) on both, or serve "
                "with --dtype bfloat16 or float16"
            )
        if other.vectors == first.vectors:
            continue
        difference = (
            f"stage 0 on {first.host} has {first.vectors} and stage {index} on {other.host} has {other.vectors}"
        )
        if config.dtype == "float32":
            raise ConfigurationError(
                f"in float32 all stages must compute the same bits, but {difference}; use machines of one kind and one "
                "version of torch, or serve with --dtype auto, bfloat16 or float16"
            )
        logger.warning("bits of the results depend on which machine computes a layer: %s", difference)
