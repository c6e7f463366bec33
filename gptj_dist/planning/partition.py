"""Cuts a model's layers into stages so that the slowest stage is as fast as can be. Stdlib only.

Stages of equal devices need no figures: the cost of one is that of its layers, plus `lm_head` on the last one. In
decode a layer's cost is the weights it streams from memory, and `lm_head` streams `vocab_size / 12 / d_model` times as
many (1.03 layers for GPT-J-6B); in prefill it runs for one row a request and costs almost nothing. The two are weighed
by the traffic assumed. Unlike devices are for `planning.search`, which shares layers by the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError

PROMPT_TOKENS_PER_OUTPUT_TOKEN = 4
"""The assumed mix of traffic."""

PREFILL_SPEEDUP = 10
"""How much cheaper a prompt token is than an output token: prefill is bound by arithmetic, decode by memory."""


StageCosts = Sequence[float]
"""What a stage costs with 1, 2, 3 ... layers, in any unit and growing; as many as fit it."""


def share_layers(num_layers: int, stages: Sequence[StageCosts]) -> tuple[int, ...]:
    """The layers of each stage, one or more, that make the costliest stage cheapest.

    Gives out one layer after the other where it makes the cheapest stage, which no exchange can better, as costs only
    grow. Between equals the last stage goes first, then the others from the first.

    Raises:
        ValueError: they do not fit.
    """
    layers = [1] * len(stages)
    last = len(stages) - 1
    if not len(stages) <= num_layers <= sum(map(len, stages)) or not all(stages):
        raise ValueError(f"{num_layers} layers do not fit {len(stages)} stages")
    for _ in range(num_layers - len(stages)):
        has_room = [i for i, costs in enumerate(stages) if layers[i] < len(costs)]
        layers[min(has_room, key=lambda i: (stages[i][layers[i]], i != last, i))] += 1
    return tuple(layers)


def lm_head_cost_layers(model: ModelConfig) -> float:
    """Cost of `lm_head` in layers, averaged over the assumed traffic."""
    decode_cost = model.embedding_parameters / model.layer_matrix_parameters
    prompt_work = PROMPT_TOKENS_PER_OUTPUT_TOKEN / PREFILL_SPEEDUP
    return decode_cost / (1 + prompt_work)


def stage_costs(model: ModelConfig, layers: tuple[int, ...]) -> tuple[float, ...]:
    """Cost of each of equal devices' stages, in layers."""
    return (*map(float, layers[:-1]), layers[-1] + lm_head_cost_layers(model))


def plan_partition(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """The layers of each stage on equal devices: the slowest as cheap as can be, the last as long as that allows.

    Raises:
        ConfigurationError: more stages than layers.
    """
    if num_stages > model.num_layers:
        raise ConfigurationError(f"cannot cut {model.num_layers} layers into {num_stages} stages")
    plain = [float(n + 1) for n in range(model.num_layers)]
    with_head = [cost + lm_head_cost_layers(model) for cost in plain]
    return share_layers(model.num_layers, [*[plain] * (num_stages - 1), with_head])


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
