"""Cuts a model's layers into stages so that the slowest stage is as fast as can be. Stdlib only; knows no devices.

The cost of a stage is that of its layers, plus `lm_head` on the last one. In decode a layer's cost is the weights it
streams from memory, and `lm_head` streams `vocab_size / 12 / d_model` times as many (1.03 layers for GPT-J-6B); in
prefill it runs for one row a request and costs almost nothing. The planner weighs the two by the traffic it assumes.
"""

from __future__ import annotations

from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError

PROMPT_TOKENS_PER_OUTPUT_TOKEN = 4
"""The assumed mix of traffic."""

PREFILL_SPEEDUP = 10
"""How much cheaper a prompt token is than an output token: prefill is bound by arithmetic, decode by memory."""


def lm_head_cost_layers(model: ModelConfig) -> float:
    """Cost of `lm_head` in layers, averaged over the assumed traffic."""
    layer_parameters = 4 * model.d_model**2 + 2 * model.d_model * model.d_ff
    decode_cost = model.vocab_size * model.d_model / layer_parameters
    prompt_work = PROMPT_TOKENS_PER_OUTPUT_TOKEN / PREFILL_SPEEDUP
    return decode_cost / (1 + prompt_work)


def stage_costs(model: ModelConfig, layers: tuple[int, ...]) -> tuple[float, ...]:
    """Cost of each stage, in layers."""
    return (*map(float, layers[:-1]), layers[-1] + lm_head_cost_layers(model))


def plan_partition(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """The layers of each stage that make the slowest stage cheapest; among equals, the one with the longest last stage.

    Raises:
        ConfigurationError: more stages than layers.
    """
    if num_stages > model.num_layers:
        raise ConfigurationError(f"cannot cut {model.num_layers} layers into {num_stages} stages")
    return min(
        ((*_even(model.num_layers - last, num_stages - 1), last) for last in _last_stage_sizes(model, num_stages)),
        key=lambda layers: (max(stage_costs(model, layers)), -layers[-1]),
    )


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


def _last_stage_sizes(model: ModelConfig, num_stages: int) -> range:
    """A lone stage takes all layers; otherwise the last takes 1 or more and leaves 1 or more to each other stage."""
    most = model.num_layers - (num_stages - 1)
    return range(most, most + 1) if num_stages == 1 else range(1, most + 1)


def _even(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """`num_layers` over `num_stages`, the longer ones first."""
    if num_stages == 0:
        return ()
    base, extra = divmod(num_layers, num_stages)
    return (base + 1,) * extra + (base,) * (num_stages - extra)
