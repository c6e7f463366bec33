"""Cuts a model's layers into stages on equal devices. Stdlib only.

No figures are needed: a stage costs its layers, and the last one `lm_head` too. For a token that is sampled, that is as
many layers as its bytes are: 1.03 for GPT-J-6B, and 1.83 in int4, which leaves it 8 bits. For a prompt's it is nothing.
Prompts and outputs take turns more than they share a micro-batch, so each kind of token is as slow as the stage that is
slowest for it. Unlike devices are for `planning.search`.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.cost import number_bytes

PROMPT_TOKENS_PER_OUTPUT_TOKEN = 4
"""The assumed mix of traffic."""

OUTPUT_TOKEN_COST = 3
"""What a layer takes for an output token, in prompt tokens. Measured 2 to 3 with 32 requests on CPUs, which is where it
matters: small models have a large `lm_head` and run on CPUs."""


@dataclass(frozen=True, slots=True)
class CutCost:
    """What a cut costs, in layers.

    Args:
        prompt, output: of the stage that is slowest for a prompt's tokens, and for those that are sampled.
    """

    prompt: float
    output: float

    @property
    def of_traffic(self) -> float:
        """An output token and the prompt tokens that come with it, in layers times prompt tokens."""
        return PROMPT_TOKENS_PER_OUTPUT_TOKEN * self.prompt + OUTPUT_TOKEN_COST * self.output


def lm_head_cost_layers(model: ModelConfig) -> float:
    """Cost of `lm_head` in layers, for a token that is sampled: its bytes, compared with those of a mean layer."""
    ratio = model.embedding_parameters / model.layer_matrix_parameters
    if model.quantization is None:
        return ratio
    of_layers = [number_bytes(model, bits) for bits in model.quantization.layer_bits]
    return ratio * number_bytes(model, model.quantization.head_bits) * len(of_layers) / sum(of_layers)


def cut_cost(model: ModelConfig, layers: tuple[int, ...]) -> CutCost:
    """The cost of a cut, given the number of layers of each stage."""
    return CutCost(float(max(layers)), float(max(*layers, layers[-1] + lm_head_cost_layers(model))))


def plan_partition(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """The layers of each stage on equal devices that cost the assumed traffic least.

    The stages before the last are equal but for one layer, the longer ones first. Between equals the last stage is the
    longest.

    Raises:
        ConfigurationError: more stages than layers.
    """
    if num_stages > model.num_layers:
        raise ConfigurationError(f"cannot cut {model.num_layers} layers into {num_stages} stages")
    if num_stages == 1:
        return (model.num_layers,)
    cuts = (
        (*_evenly(model.num_layers - last, num_stages - 1), last)
        for last in range(model.num_layers - num_stages + 1, 0, -1)
    )
    return min(cuts, key=lambda layers: cut_cost(model, layers).of_traffic)


def _evenly(num_layers: int, num_stages: int) -> tuple[int, ...]:
    each, rest = divmod(num_layers, num_stages)
    return (each + 1,) * rest + (each,) * (num_stages - rest)


def explicit_partition(model: ModelConfig, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Checks layers that a person chose.

    Raises:
        ConfigurationError: they do not add up to the model's.
    """
    if sum(layers) != model.num_layers:
        raise ConfigurationError(f"layers {layers} add up to {sum(layers)}, but the model has {model.num_layers}")
    return layers


def layer_ranges(layers: tuple[int, ...]) -> tuple[LayerRange, ...]:
    """The first and last layer of each stage."""
    stops = [sum(layers[: i + 1]) for i in range(len(layers))]
    return tuple(
        LayerRange(i, len(layers), stop - n, stop) for i, (n, stop) in enumerate(zip(layers, stops, strict=True))
    )
