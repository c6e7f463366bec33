"""`gptj-dist generate`: one completion in this process, without Ray, streamed to the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from gptj_dist.cli.options import Model, TraceFile
from gptj_dist.cli.pipeline_settings import Settings, takes_settings
from gptj_dist.cli.request_options import MAX_TOKENS, MIN_P, TEMPERATURE, TOP_K, TOP_P, Seed, StopOption, given
from gptj_dist.cli.streams import as_text
from gptj_dist.params import SamplingParams

DEFAULTS = {"max_tokens": 64, "temperature": 0.8}


@takes_settings(
    "stages",
    "layers",
    "device",
    "dtype",
    "quantize",
    "threads_per_stage",
    "max_model_len",
    "kv_cache_gb",
    "generation_config",
    "revision",
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.", metavar="TEXT", parser=as_text)],
    settings: Settings,
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    temperature: Annotated[float | None, TEMPERATURE] = None,
    top_p: Annotated[float | None, TOP_P] = None,
    top_k: Annotated[int | None, TOP_K] = None,
    min_p: Annotated[float | None, MIN_P] = None,
    seed: Seed = None,
    stop: StopOption = None,
    trace: TraceFile = None,
) -> None:
    """Continue a prompt in this process, without Ray, and print the text as it comes.

    Without options it makes at most 64 tokens at temperature 0.8, or as the checkpoint's generation_config.json says.
    """
    asked = given(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )
    SamplingParams(**asked)  # an invalid value is reported before the model is loaded
    from gptj_dist.llm import LLM
    from gptj_dist.stages.trace import check_trace_path

    check_trace_path(trace)
    with LLM(model, **settings, max_batch_size=1) as llm:
        print(prompt, end="")
        for text in llm.stream(prompt, SamplingParams(**{**DEFAULTS, **llm.defaults, **asked})):
            print(text, end="", flush=True)
        if trace is not None:
            llm.write_trace(trace)
    print()
