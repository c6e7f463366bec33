"""`gptj-dist batch`: a file of requests answered by a running server or in this process, resumable after a kill."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_dist.cli.request_options import DEFAULT_TIMEOUT_S, DEFAULT_URL, ApiKey, Timeout, Url
from gptj_dist.errors import ConfigurationError, GPTJDistError

if TYPE_CHECKING:
    from gptj_dist.cli.batch_files import Answer, AnswerFile
    from gptj_dist.cli.batch_run import Answerer
    from gptj_dist.cli.progress import Display

HAS_FAILURES = 1
DEFAULT_CONCURRENCY = 32
DEFAULT_WAIT_S = 600.0


def batch(
    requests: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help="Requests, one a line, as OpenAI's batches have them.")
    ],
    answers: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="Answers are appended to it; it says how far the batch has got.")
    ],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = DEFAULT_CONCURRENCY,
    wait: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long to put up with a server that is busy, loading or away."),
    ] = DEFAULT_WAIT_S,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Answer a file of requests. Killed or interrupted, the same command goes on where it was.

    A line of IN.jsonl is {"custom_id": ..., "method": "POST", "url": "/v1/completions", "body": {...}}; the url may be
    that of chat completions or embeddings too. A request that the server refuses has its error in OUT.jsonl, and is
    not sent again: remove its line to do so. Exit code 1 if there are any.
    """
    from gptj_dist.cli.batch_files import AnswerFile, check_requests
    from gptj_dist.cli.client import Endpoint

    endpoint = Endpoint.of(url, api_key, timeout)
    expected = check_requests(requests)
    with AnswerFile(answers, expected) as file:
        ...
