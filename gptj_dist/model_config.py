"""The shape of a GPT-J, read of the fields of its `config.json`. Stdlib only.

Knows nothing of files: `checkpoint` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

from gptj_dist.errors import CheckpointError, ConfigurationError, excerpt
from gptj_dist.generation import NO_GENERATION_CONFIG, GenerationConfig, eos_token_ids
from gptj_dist.quantization import INT4_GROUP, QUANT_METHOD, Quantization

DTypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: Mapping[DTypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

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

_MAX_SIZE = 1 << 20
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
