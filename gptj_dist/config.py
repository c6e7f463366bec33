"""What is served and how: the model's shape and the pipeline's settings, checked once and frozen. Stdlib only.

Knows nothing of files, devices or Ray: `checkpoint` reads a `ModelConfig`, `stages` turns a `PipelineConfig` into
stages.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

from gptj_dist.errors import CheckpointError, ConfigurationError, excerpt
from gptj_dist.field_types import type_problems
from gptj_dist.generation import NO_GENERATION_CONFIG, GenerationConfig, eos_token_ids
from gptj_dist.quantization import AUTO, INT4_GROUP, NONE, QUANT_METHOD, Quantization, parse_quantize

DeviceKind = Literal["cpu", "cuda"]
DTypeName = Literal["float32", "bfloat16", "float16"]
DeviceChoice = Literal["auto", DeviceKind]
DTypeChoice = Literal["auto", DTypeName]
DTYPE_BYTES: Mapping[DTypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

BLOCK_SIZE_TOKENS = 16
DEFAULT_MAX_BATCH_SIZE = 64
MAX_SPARES = 16
DEFAULT_MAX_QUEUED_REQUESTS = 1024
DEFAULT_MAX_QUEUED_TOKENS = 1_000_000
"""About what the largest body holds: 4 MB of English text."""

DEFAULT_CHAT_MAX_TOKENS = 512
DEFAULT_APP_NAME = "gptj-dist"
DEFAULT_DRAIN_S = 30.0
GPTJ_END_OF_TEXT_ID = 50256
"""`bos_token_id` and `eos_token_id` of a `config.json` without the fields, as in transformers."""

GPTJ_ROTARY_DIM = 64
"""What a `config.json` without the field means, as in transformers."""

_ALIASES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
"""Fields of `config.json` by the names that GPT-J's has, and by those of other models, which some tools write."""

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

_MAX_SIZE = 1 << 20
_MAX_RESOURCE = 1_000_000
"""GB, CPUs or GPUs: more than any machine has."""

_MAX_LAYERS = 1024
"""Beyond any GPT-J, and small enough that a broken file costs nothing before it is refused."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one GPT-J, and its rules for generating text; what inference reads of the Hugging Face layout.

    Args:
        eos_token_ids: tokens that end a text.
        bos_token_id: the token that begins a text, where the checkpoint names one.
        quantization: the bits of the weights; None if they all have the type of the model.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    rotary_dim: int
    d_ff: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    dtype: DTypeName = "float32"
    layer_norm_eps: float = 1e-5
    has_tied_embeddings: bool = False
    bos_token_id: int | None = None
    generation: GenerationConfig = NO_GENERATION_CONFIG
    quantization: Quantization | None = None

    @property
    def empty_prompt_ids(self) -> tuple[int, ...]:
        """The tokens that an empty prompt stands for; none if the checkpoint has no token for the ends of a text."""
        return self.eos_token_ids[:1] if self.bos_token_id is None else (self.bos_token_id,)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def layer_matrix_parameters(self) -> int:
        """Parameters of a layer that are multiplied with: all but biases and LayerNorm."""
        return 4 * self.d_model**2 + 2 * self.d_model * self.d_ff

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: its matrices, the MLP's two biases, and the LayerNorm."""
        return self.layer_matrix_parameters + self.d_ff + 3 * self.d_model

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of the embedding, the same as of `lm_head`'s matrix."""
        return self.vocab_size * self.d_model

    @property
    def head_parameters(self) -> int:
        """Parameters of the final LayerNorm and of `lm_head` with its bias, whether or not its matrix is shared."""
        return self.embedding_parameters + self.vocab_size + 2 * self.d_model

    def quantized(self, quantization: Quantization) -> ModelConfig:
        """The same model with weights of few bits.

        Raises:
            ConfigurationError: 4 bits are wanted, and the rows of its matrices are no whole number of groups.
        """
        odd = [columns for columns in (self.d_model, self.d_ff) if columns % INT4_GROUP]
        if odd and 4 in quantization.layer_bits:
            raise ConfigurationError(
                f"int4 needs widths that are multiples of {INT4_GROUP}, and this model has {odd[0]}: use int8"
            )
        return replace(self, quantization=quantization)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Reads the fields of a Hugging Face `config.json`, and of `generation_config.json` where there is one.

        Texts end at the end tokens of both. What else is said about generation, `config.json` says where there is no
        other file, as in transformers.

        Raises:
            CheckpointError: not a GPT-J, a field is missing, or the numbers contradict each other.
        """
        if config.get("model_type") != "gptj":
            kind = excerpt(config.get("model_type"))
            raise CheckpointError(f"config.json: model_type is {kind}, only 'gptj' is served")
        if config.get("activation_function", "gelu_new") != "gelu_new":
            raise CheckpointError(f"config.json: unknown activation_function {excerpt(config['activation_function'])}")
        config = {name: config[alias] for name, alias in _ALIASES.items() if alias in config} | dict(config)
        missing = [k for k in ("vocab_size", "n_layer", "n_embd", "n_head", "n_positions") if k not in config]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}")
        num_layers = _positive_int(config, "n_layer")
        if num_layers > _MAX_LAYERS:
            raise CheckpointError(f"config.json: n_layer {num_layers} is more than {_MAX_LAYERS}")
        d_model = _positive_int(config, "n_embd")
        num_heads = _positive_int(config, "n_head")
        if d_model % num_heads:
            raise CheckpointError(f"config.json: n_embd {d_model} is not a multiple of n_head {num_heads}")
        d_ff = _positive_int(config, "n_inner") if config.get("n_inner") is not None else 4 * d_model
        vocab_size = _positive_int(config, "vocab_size")
        eos_ids = _eos_token_ids(config, generation or {}, vocab_size)
        layer_norm_eps = config.get("layer_norm_epsilon", 1e-5)
        if not isinstance(layer_norm_eps, float) or not 0 < layer_norm_eps < 1:
            shown = excerpt(layer_norm_eps)
            raise CheckpointError(f"config.json: layer_norm_epsilon {shown} must be a small positive number")
        model = cls(
            vocab_size=vocab_size,
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            rotary_dim=_rotary_dim(config, d_model // num_heads),
            d_ff=d_ff,
            context_length=_positive_int(config, "n_positions"),
            eos_token_ids=eos_ids,
            dtype=_dtype(config),
            layer_norm_eps=layer_norm_eps,
            has_tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=_bos_token_id(config, vocab_size),
            generation=GenerationConfig.from_hf(
                config if generation is None else generation,
                CONFIG_NAME if generation is None else GENERATION_CONFIG_NAME,
                vocab_size,
                eos_ids,
            ),
        )
        stored = _stored_quantization(config, num_layers)
        try:
            return model if stored is None else model.quantized(stored)
        except ConfigurationError as error:
            raise CheckpointError(f"{CONFIG_NAME}: {error}") from error


@dataclass(frozen=True, slots=True)
class LayerRange:
    """The layers [start, stop) of stage `stage` out of `num_stages`."""

    stage: int
    num_stages: int
    start: int
    stop: int

    @classmethod
    def whole(cls, num_layers: int) -> Self:
        """All layers, as the one stage of a pipeline."""
        return cls(0, 1, 0, num_layers)

    @property
    def num_layers(self) -> int:
        return self.stop - self.start

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1


def _positive_int(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise CheckpointError(f"config.json: {key} must be a whole number from 1 to {_MAX_SIZE}, got {excerpt(value)}")
    return value


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    of_generation = eos_token_ids(generation.get("eos_token_id"), GENERATION_CONFIG_NAME, vocab_size)
    if "eos_token_id" in config:
        of_config = eos_token_ids(config["eos_token_id"], CONFIG_NAME, vocab_size)
    else:
        is_said = bool(of_generation) or vocab_size <= GPTJ_END_OF_TEXT_ID
        of_config = () if is_said else (GPTJ_END_OF_TEXT_ID,)
    return tuple(dict.fromkeys(of_config + of_generation))


def _bos_token_id(config: Mapping[str, Any], vocab_size: int) -> int | None:
    """None for one that is not in the vocabulary: no text has to begin with it."""
    value = config.get("bos_token_id", GPTJ_END_OF_TEXT_ID)
    return value if type(value) is int and 0 <= value < vocab_size else None


def _rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    value = config.get("rotary_dim", GPTJ_ROTARY_DIM)
    if type(value) is int and value % 2 == 0 and 0 < value <= head_dim:
        return value
    rule = f"must be even, from 2 to the {head_dim} dimensions of a head"
    if "rotary_dim" not in config:
        raise CheckpointError(f"config.json lacks rotary_dim, which then is {GPTJ_ROTARY_DIM}, but it {rule}")
    raise CheckpointError(f"config.json: rotary_dim {rule}, got {excerpt(value)}")


def _dtype(config: Mapping[str, Any]) -> DTypeName:
    """The type of the weights. No device computes in float64, so float64 weights are taken as float32."""
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    if name == "float64":
        return "float32"
    if name not in DTYPE_BYTES:
        raise CheckpointError(f"config.json: unknown dtype {excerpt(value)}")
    return cast(DTypeName, name)


def _stored_quantization(config: Mapping[str, Any], num_layers: int) -> Quantization | None:
    """The bits of a checkpoint that `convert --quantize` has written."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping) or stored.get("quant_method") != QUANT_METHOD:
        return None
    bits, group = stored.get("bits"), stored.get("group_size")
    if type(bits) is not int or (bits, group) not in ((8, None), (4, INT4_GROUP)):
        raise CheckpointError(f"config.json: unknown bits {excerpt(bits)} with groups of {excerpt(group)}")
    return replace(Quantization.of_stages([num_layers], [4 if bits == 4 else 8]), is_stored=True)


@dataclass(frozen=True)
class PipelineConfig:
    """How one model is cut, placed and run: the settings shared by the command line, `LLM` and Serve configs.

    Args:
        model: `demo`, a directory in the Hugging Face layout, or a hub name.
        revision: branch, tag or commit on the hub.
        stages: number of stages; the planner cuts the layers by cost. None means 1, or the length of `layers`.
        layers: layers of each stage, first to last; overrides the planner.
        device: `auto` takes GPUs where there are any.
        dtype: `auto` takes the checkpoint's, unless the device is bad at it.
        quantize: `int8` or `int4` weights in place of those of that type, or the bits of stages: `0-1:int8,2:int4`.
            `none` makes numbers of that type of weights that another tool has quantised.
        threads_per_stage: the most threads of a CPU stage; None shares the cores available evenly.
        cpus_per_stage, gpus_per_stage: what each stage asks of Ray; None fits the device.
        max_model_len: the most tokens of prompt and output together; None is the model's context.
        kv_cache_gb: KV cache of the whole pipeline in 10**9 bytes; None (`auto`) takes what is free, less a margin.
        max_batch_size: the most requests that run at once; more wait.
        max_queued_requests: the most that wait in a server's pipeline; more are refused.
        max_queued_tokens: the most tokens of their prompts; a request that comes below may exceed it.
        spares: processes without weights that a server keeps on each node, to take the place of a stage that dies.
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
    stages: int | None = None
    layers: tuple[int, ...] | None = None
    device: DeviceChoice = "auto"
    dtype: DTypeChoice = "auto"
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
        _at_least_one("threads_per_stage", self.threads_per_stage)
        _at_least_one("max_model_len", self.max_model_len)
        _at_least_one("max_batch_size", self.max_batch_size)
        _at_least_one("max_queued_requests", self.max_queued_requests)
        _at_least_one("max_queued_tokens", self.max_queued_tokens)
        _at_least_one("max_chunk_tokens", self.max_chunk_tokens)
        if self.quantize not in (None, AUTO, NONE):
            parse_quantize(self.quantize)
        if not 0 <= self.spares <= MAX_SPARES:
            raise ConfigurationError(f"spares must be from 0 to {MAX_SPARES}, got {self.spares}")
        if self.layers == ():
            raise ConfigurationError("layers must name at least one stage")
        if self.layers is not None and self.stages not in (None, len(self.layers)):
            raise ConfigurationError(f"layers names {len(self.layers)} stages, but stages is {self.stages}")
        for name, value in (("kv_cache_gb", self.kv_cache_gb), ("cpus_per_stage", self.cpus_per_stage)):
            if value is not None and not 0 < value <= _MAX_RESOURCE:
                raise ConfigurationError(f"{name} must be positive and at most {_MAX_RESOURCE}, got {value:g}")
        if self.gpus_per_stage is not None and not 0 <= self.gpus_per_stage <= _MAX_RESOURCE:
            raise ConfigurationError(f"gpus_per_stage must be from 0 to {_MAX_RESOURCE}, got {self.gpus_per_stage:g}")

    @property
    def num_stages(self) -> int:
        return len(self.layers) if self.layers is not None else (self.stages or 1)


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
