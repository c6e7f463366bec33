"""`gptj-dist generate`: one completion in this process, without Ray, streamed to the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gptj_dist.cli.options import (
    Device,
    DType,
    KVCacheGB,
    Layers,
    MaxModelLen,
    Model,
    Revision,
    Stages,
    ThreadsPerStage,
    Trace,
    parse_kv_cache_gb,
    parse_layers,
)
from gptj_dist.params import SamplingParams


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; larger is more random.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this part of the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes the output repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be given several times.")] = None,
    stages: Stages = None,
    layers: Layers = None,
    device: Device = "auto",
    dtype: DType = "auto",
    threads_per_stage: ThreadsPerStage = None,
    max_model_len: MaxModelLen = None,
    kv_cache_gb: KVCacheGB = "auto",
    revision: Revision = None,
    trace: Trace = None,
) -> None:
    """Continue a prompt in this process, without Ray, and print the text as it comes."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    from gptj_dist.llm import LLM
    from gptj_dist.stages.trace import check_trace_path

    check_trace_path(trace)
    with LLM(
        model,
        revision=revision,
        stages=stages,
        layers=parse_layers(layers),
        device=device,
        dtype=dtype,
        threads_per_stage=threads_per_stage,
        max_model_len=max_model_len,
        kv_cache_gb=parse_kv_cache_gb(kv_cache_gb),
        max_batch_size=1,
    ) as llm:
        sys.stdout.write(prompt)
        for text in llm.stream(prompt, params):
            sys.stdout.write(text)
            sys.stdout.flush()
        if trace is not None:
            llm.write_trace(trace)
    sys.stdout.write("\n")
