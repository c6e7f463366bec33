"""Compares the results of a checkpoint here with those of transformers, layer by layer. For CPUs.

transformers' GPT-J shares no code with this package, so it is the reference. Only `trace_theirs` imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptj_dist.config import BLOCK_SIZE_TOKENS, DTYPE_BYTES, LayerRange, ModelConfig
from gptj_dist.engine.plan import Chunk, NewRequest, Plan
from gptj_dist.errors import CheckpointError, ConfigurationError
from gptj_dist.params import SamplingParams
from gptj_dist.planning.cost import weight_bytes
from gptj_dist.sizes import bytes_text, ceil_div
from gptj_dist.stages.blueprint import StageSpec
from gptj_dist.stages.device import free_bytes
from gptj_dist.stages.runner import StageRunner
from gptj_dist.token_rules import TokenRules

EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """The float32 activations of a model for one prompt.

    Args:
        hidden: [tokens, d_model] each: output of the embedding, then of each layer, not normalised.
        logits: [tokens, vocab_size], of every position.
    """

    hidden: tuple[Tensor, ...]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """The first part of the model in which two traces differ.

    Args:
        part: `embedding`, `layer 3` or `head`.
        largest: of the absolute differences in that part's output.
        magnitude: the largest absolute number in the oracle's.
    """

    part: str
    largest: float
    magnitude: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two traces of one prompt.

    Args:
        largest: of the absolute differences between logits.
        num_alike: positions at which the greedy next token is the same.
        first: the first part that differs, if the logits differ by more than the tolerance.
    """

    num_tokens: int
    largest: float
    num_alike: int
    first: Difference | None


def require_memory(config: ModelConfig, num_tokens: int) -> None:
    """Checks that the free memory holds the oracle's weights, and both models' traces of this number of tokens.

    Raises:
        ConfigurationError: the memory is too small; the message says how much is needed.
    """
    whole = LayerRange.whole(config.num_layers)
    numbers_per_token = 2 * ((config.num_layers + 1) * config.d_model + config.vocab_size)
    traces_bytes = num_tokens * numbers_per_token * DTYPE_BYTES["float32"]
    needed_bytes = weight_bytes(config, whole, "float32") + traces_bytes
    if needed_bytes > (free := free_bytes(torch.device("cpu"))):
        raise ConfigurationError(
            f"transformers needs {bytes_text(needed_bytes)} for this model in float32, but only {bytes_text(free)} of "
            "memory are free: run this on a larger machine"
        )


def oracle_version() -> str:
    """The version of transformers.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            "the numbers are compared with those of transformers, which cannot be imported: "
            "pip install 'transformers>=5'"
        ) from error
    return str(transformers.__version__)


@torch.inference_mode()
def trace_theirs(directory: Path, prompts: Sequence[Sequence[int]]) -> list[LayerTrace]:
    """Computes each prompt in one pass with transformers.

    Args:
        directory: a complete checkpoint.
        prompts: token ids.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import GPTJForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model: Any = GPTJForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    # It raises whatever the libraries below it do.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"transformers cannot load {directory}: {type(error).__name__}: {reason}") from error
    return [_trace_theirs(model, prompt) for prompt in prompts]


def _trace_theirs(model: Any, prompt: Sequence[int]) -> LayerTrace:
    # The last of transformers' hidden states has been through ln_f; what goes in there is what the last layer gave.
    last: list[Tensor] = []
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    output = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
    hook.remove()
    return LayerTrace(tuple(state[0] for state in (*output.hidden_states[:-1], *last)), output.logits[0])


@torch.inference_mode()
def trace_ours(model: str, config: ModelConfig, prompts: Sequence[Sequence[int]]) -> list[LayerTrace]:
    """Reads each prompt at once with stages of one layer, of which only one is in memory at a time.

    The last layer is there twice: as the stage before the last, which gives its hidden states, and again below the
    head. That one reads a token at a time, because a stage gives logits only where a chunk ends.

    Args:
        model: the directory of a complete checkpoint, or `demo`.
        prompts: token ids.

    Raises:
        CheckpointError: weights are missing.
    """
    num_layers = config.num_layers
    max_model_len = max(map(len, prompts))
    hidden: list[list[Tensor]] = [[] for _ in prompts]
    for layer in range(num_layers):
        layers = LayerRange(layer, num_layers + 1, layer, layer + 1)
        runner = _load_stage(model, config, layers, max_model_len)
        for request_id, (prompt, states) in enumerate(zip(prompts, hidden, strict=True)):
            plan = _plan(request_id, 0, prompt)
            if layers.is_first:
                states.append(runner.embed(plan))
            states.append(runner.forward(plan, states[-1]))
    again = LayerRange(num_layers, num_layers + 1, num_layers - 1, num_layers)
    head = _load_stage(model, config, again, max_model_len)
    logits = [_logits(head, *request) for request in zip(range(len(prompts)), prompts, hidden, strict=True)]
    return [LayerTrace(tuple(states), rows) for states, rows in zip(hidden, logits, strict=True)]


def compare(theirs: LayerTrace, ours: LayerTrace, tolerance: float) -> Comparison:
    """Compares the logits; where one differs by more than `tolerance`, finds the first part that does.

    A part's output differs if a number of it does by more than `tolerance` times the largest of them.
    """
    num_alike = int((ours.logits.argmax(-1) == theirs.logits.argmax(-1)).sum())
    head = _difference(HEAD, theirs.logits, ours.logits)
    if head.largest <= tolerance:  # false for NaN
        return Comparison(len(theirs.logits), head.largest, num_alike, None)
    parts = [EMBEDDING, *(f"layer {layer}" for layer in range(len(theirs.hidden) - 1))]
    states = map(_difference, parts, theirs.hidden, ours.hidden)
    first = next((state for state in states if not state.largest <= tolerance * state.magnitude), head)
    return Comparison(len(theirs.logits), head.largest, num_alike, first)


def _difference(part: str, theirs: Tensor, ours: Tensor) -> Difference:
    return Difference(part, float((ours - theirs).abs().max()), float(theirs.abs().max()))


def _load_stage(model: str, config: ModelConfig, layers: LayerRange, max_model_len: int) -> StageRunner:
    rules = TokenRules(config.vocab_size)
    spec = StageSpec(model, None, config, layers, "cpu", max_model_len, max_batch_size=1, rules=rules)
    runner = StageRunner(spec)
    runner.load("float32", num_threads=None)
    runner.allocate(_num_blocks(max_model_len))
    return runner


def _logits(head: StageRunner, request_id: int, prompt: Sequence[int], states: Sequence[Tensor]) -> Tensor:
    """Logits of every position, from the hidden states before the last layer."""
    rows = [
        head.forward(_plan(request_id, position, [token_id]), states[-2][position : position + 1])
        for position, token_id in enumerate(prompt)
    ]
    return torch.cat(rows)


def _plan(request_id: int, start: int, token_ids: Sequence[int]) -> Plan:
    """A plan of one chunk; where it is the request's first, the request before it makes room. Blocks lie in order."""
    is_new = start == 0
    new_blocks = tuple(range(_num_blocks(start), _num_blocks(start + len(token_ids))))
    return Plan(
        plan_id=0,
        released=(request_id - 1,) if is_new and request_id else (),
        new_requests=(NewRequest(request_id, SamplingParams(), noise_key=0, num_prompt_tokens=0),) if is_new else (),
        chunks=(Chunk(request_id, start, tuple(token_ids), new_blocks, samples=True),),
    )


def _num_blocks(num_tokens: int) -> int:
    return ceil_div(num_tokens, BLOCK_SIZE_TOKENS)
