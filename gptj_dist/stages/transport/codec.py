"""Frames as bytes: a msgpack header, and for hidden states their raw bytes behind it. No pickle, no torch.

Every frame carries the epoch of the pipeline that it belongs to; frames of another epoch are leftovers.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any, assert_never

import msgpack

from gptj_dist.config import DTypeName
from gptj_dist.engine.plan import (
    Chunk,
    Embedding,
    NewRequest,
    Plan,
    PromptCopy,
    PromptLogprobs,
    Result,
    StageTiming,
)
from gptj_dist.params import Pooling, SamplingControls, TokenLogprobs


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """A tensor on the wire.

    Args:
        shape: rows, d_model.
        data: its bytes, row by row.
    """

    dtype: DTypeName
    shape: tuple[int, int]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class PlanFrame:
    """Towards the next stage.

    Args:
        hidden: stage 0 gets none.
        timings: of the stages that the plan has passed.
        edge_bytes: what it took up on the edges to them.
        embeddings: that they have completed.
    """

    plan: Plan
    hidden: HiddenStates | None
    timings: tuple[StageTiming, ...] = ()
    edge_bytes: tuple[int, ...] = ()
    embeddings: tuple[Embedding, ...] = ()


@dataclass(frozen=True, slots=True)
class ResultFrame:
    """From the last stage to the coordinator.

    Args:
        edge_bytes: what the plan took up on the edges to all stages.
    """

    result: Result
    edge_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EndFrame:
    """Nothing will follow: a stage passes it on and ends."""


Frame = PlanFrame | ResultFrame | EndFrame


def encode(epoch: int, frame: Frame) -> list[bytes | memoryview]:
    """The parts of the frame's message."""
    match frame:
        case PlanFrame(plan, hidden, timings, edge_bytes, embeddings):
            head = None if hidden is None else (hidden.dtype, hidden.shape)
            packed = _pack(epoch, "plan", _plan_to_wire(plan), head, timings, edge_bytes, embeddings)
            return [packed] if hidden is None else [packed, hidden.data]
        case ResultFrame(result, edge_bytes):
            told = (result.logprobs, result.prompt_logprobs, result.embeddings)
            return [_pack(epoch, "result", (result.plan_id, result.token_ids, result.timings, *told), edge_bytes)]
        case EndFrame():
            return [_pack(epoch, "end")]
    assert_never(frame)


def decode(parts: list[bytes], epoch: int) -> Frame | None:
    """The frame of a message, or None if it belongs to another epoch.

    Raises:
        ValueError: not a message of ours.
    """
    frame_epoch, kind, *body = msgpack.unpackb(parts[0], use_list=False)
    if frame_epoch != epoch:
        return None
    match kind, body:
        case "plan", [plan, head, timings, edge_bytes, embeddings]:
            hidden = None if head is None else HiddenStates(dtype=head[0], shape=head[1], data=parts[1])
            done = tuple(map(Embedding._make, embeddings))
            return PlanFrame(_plan_from_wire(plan), hidden, _timings_from_wire(timings), edge_bytes, done)
        case "result", [(plan_id, token_ids, timings, logprobs, prompt_logprobs, embeddings), edge_bytes]:
            told = tuple(None if token is None else TokenLogprobs(*token) for token in logprobs)
            of_prompts = tuple(
                PromptLogprobs(request_id, start, tuple(map(TokenLogprobs._make, tokens)))
                for request_id, start, tokens in prompt_logprobs
            )
            done = tuple(map(Embedding._make, embeddings))
            result = Result(plan_id, token_ids, _timings_from_wire(timings), told, of_prompts, done)
            return ResultFrame(result, edge_bytes)
        case "end", []:
            return EndFrame()
    raise ValueError(f"unknown kind of frame: {kind!r}")


def _pack(*fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def _plan_to_wire(plan: Plan) -> tuple[object, ...]:
    new_requests = [
        (
            (r.request_id, r.temperature, r.top_p, r.top_k, r.min_p, r.noise_key, r.min_position),
            None if r.controls is None else astuple(r.controls),
            r.log_id,
            r.begins_with,
            None if r.pooling is None else astuple(r.pooling),
        )
        for r in plan.new_requests
    ]
    chunks = [
        (c.request_id, c.start, c.token_ids, c.new_blocks, c.samples, c.next_id, c.tells_embedding) for c in plan.chunks
    ]
    return plan.plan_id, plan.released, new_requests, chunks


def _plan_from_wire(wire: tuple[int, tuple[int, ...], list[tuple[Any, ...]], list[tuple[Any, ...]]]) -> Plan:
    plan_id, released, new_requests, chunks = wire
    return Plan(
        plan_id,
        released,
        tuple(map(_new_request_from_wire, new_requests)),
        tuple(Chunk(*fields) for fields in chunks),
    )


def _new_request_from_wire(wire: tuple[Any, ...]) -> NewRequest:
    settings, controls, log_id, begins_with, pooling = wire
    return replace(
        NewRequest(*settings),
        controls=None if controls is None else SamplingControls(*controls),
        log_id=log_id,
        begins_with=None if begins_with is None else PromptCopy(*begins_with),
        pooling=None if pooling is None else Pooling(*pooling),
    )


def _timings_from_wire(wire: tuple[tuple[int, int], ...]) -> tuple[StageTiming, ...]:
    return tuple(map(StageTiming._make, wire))
