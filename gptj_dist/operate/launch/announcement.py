"""Prints the stages, the address and an example request when the server is ready."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.operate.launch.settings import Launch
from gptj_dist.operate.tables import stage_table

if TYPE_CHECKING:
    from gptj_dist.serving.pipeline import PipelineStatus

EXAMPLE = {"prompt": "The state of the Union is", "max_tokens": 40, "stream": True}


def announce(
    launch: Launch,
    base: str,
    statuses: Sequence[PipelineStatus],
    elapsed_s: float,
    has_proxy: bool,
    console: Console,
) -> None:
    """Prints it.

    Args:
        statuses: of the pipelines that answered.
        elapsed_s: since the start.
        has_proxy: as `needs_noproxy`.
    """
    from gptj_dist.stages.actor import log_directory
    from gptj_dist.stages.blueprint import is_lossless

    for status in statuses[:1]:
        console.print(stage_table(status.stages, status.limits.kv_tokens))
        model = read_model_config(resolve_model(launch.app.pipeline.model, launch.app.pipeline.revision))
        dtype = status.stages[0].dtype
        if launch.app.pipeline.dtype == "auto" and not is_lossless(model, dtype):
            console.print(f"The {model.dtype} weights are rounded to {dtype}, because the memory is small.")
    names = " or ".join(launch.app.model_names)
    console.print(f"Ready after {elapsed_s:.1f} s: {names} at {base}", soft_wrap=True)
    console.print(f"Write with it in a browser: {base}/", soft_wrap=True)
    console.print(f"\n  {example_command(base, launch.api_key is not None, has_proxy)}\n", soft_wrap=True)
    console.print(f"Logs: {log_directory()}", soft_wrap=True)
    console.print("Ctrl-C stops.")


def example_command(base: str, needs_key: bool, has_proxy: bool) -> str:
    """A curl command that streams a completion."""
    options = " --noproxy '*'" * has_proxy + ' -H "Authorization: Bearer $GPTJ_API_KEY"' * needs_key
    return f"curl -N {base}/v1/completions{options} -d '{json.dumps(EXAMPLE)}'"


def needs_noproxy(host: str) -> bool:
    """Whether the environment would send a request to the host through a proxy."""
    has_proxy = {"http", "https", "all"} & urllib.request.getproxies().keys()
    return bool(has_proxy) and not urllib.request.proxy_bypass(host)
