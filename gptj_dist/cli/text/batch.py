"""`gptj-dist batch`: a file of requests answered by a running server or in this process, resumable after a kill."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_dist.cli.options import (
    PIPELINE_PANEL,
    ChatMaxTokens,
    ChatStop,
    ServedModelName,
    TemplateFile,
    ToolFormat,
    parse_chat_stop,
    seconds,
)
from gptj_dist.cli.pipeline_settings import OPTIONS, Settings, takes_settings
from gptj_dist.cli.request_options import DEFAULT_TIMEOUT_S, DEFAULT_URL, KeyOption, ServerUrl, Timeout
from gptj_dist.cli.streams import complain
from gptj_dist.config import DEFAULT_CHAT_MAX_TOKENS, SERVER_SETTINGS, PipelineConfig
from gptj_dist.errors import ConfigurationError, GPTJDistError

if TYPE_CHECKING:
    from gptj_dist.cli.progress import Display
    from gptj_dist.cli.text.batch_answers import AnswerFile, BatchAnswer
    from gptj_dist.cli.text.batch_requests import RequestFile
    from gptj_dist.cli.text.batch_run import Answerer, Patience

HAS_FAILURES = 1
DEFAULT_CONCURRENCY = 32
DEFAULT_WAIT_S = 600.0

SERVER_OPTIONS = ("url", "api_key", "timeout", "wait")
LOCAL_SETTINGS = tuple(name for name in OPTIONS if name not in SERVER_SETTINGS)

LOCAL_OPTIONS = (*LOCAL_SETTINGS, "served_model_name", "chat_template", "chat_max_tokens", "chat_stop", "tool_format")


@takes_settings(*LOCAL_SETTINGS)
def batch(
    context: typer.Context,
    requests: Annotated[
        Path, typer.Argument(metavar="IN", help="Requests, one a line, in the form of OpenAI's batches; - or a pipe.")
    ],
    answers: Annotated[
        Path, typer.Argument(metavar="OUT", help="File that answers are appended to; a later run resumes from it.")
    ],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = DEFAULT_CONCURRENCY,
    url: ServerUrl = DEFAULT_URL,
    api_key: KeyOption = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            parser=seconds,
            help="Longest time without any answer, from a server that is busy, loading or away.",
            rich_help_panel="Server",
        ),
    ] = DEFAULT_WAIT_S,
    model: Annotated[
        str | None,
        typer.Option(
            help="Answer in this process, without a server: 'demo', a directory or a hub name.",
            rich_help_panel=PIPELINE_PANEL,
            metavar="MODEL",
        ),
    ] = None,
    served_model_name: ServedModelName = None,
    chat_template: TemplateFile = None,
    chat_max_tokens: ChatMaxTokens = DEFAULT_CHAT_MAX_TOKENS,
    chat_stop: ChatStop = None,
    tool_format: ToolFormat = None,
    *,
    settings: Settings,
) -> None:
    """Answer a file of requests. After a kill or an interrupt, the same command resumes.

    A line of IN is {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "The whale"}}, or
    has the url of chat or embeddings. A request that is refused has its error in OUT, and is sent again only if its
    line is removed there. Exit code 1 if any request was refused.
    """
    from gptj_dist.cli.text.batch_answers import AnswerFile
    from gptj_dist.cli.text.batch_requests import RequestFile
    from gptj_dist.cli.text.batch_run import Patience

    answerer: AbstractAsyncContextManager[Answerer]
    if model is None:
        _refuse_options(context, LOCAL_OPTIONS, "needs --model, which answers the requests in this process")
        from gptj_dist.cli.client import ServerAddress
        from gptj_dist.cli.text.batch_http import HttpAnswerer

        answerer = HttpAnswerer(ServerAddress.of(url, api_key, timeout), concurrency)
    else:
        _refuse_options(context, SERVER_OPTIONS, "is for a server, but --model answers the requests in this process")
        from gptj_dist.answers.chat_defaults import ChatDefaults
        from gptj_dist.cli.text.batch_local import answering_here

        chat = ChatDefaults(chat_max_tokens, parse_chat_stop(chat_stop), tool_format)
        config = PipelineConfig(model, **settings)
        answerer = answering_here(config, tuple(served_model_name or ()), chat_template, chat)
    with RequestFile(requests) as asked, AnswerFile(answers, asked.check()) as file:
        num_requests = len(file.expected)
        if len(file.answered) < num_requests:
            _run(asked, file, answerer, concurrency, Patience(wait))
        else:
            print(f"{answers}: all {num_requests} requests have been answered")
        num_failed = file.num_failed
    if num_failed:
        complain(f"{num_failed} of {num_requests} requests failed; {answers} says why")
        raise typer.Exit(HAS_FAILURES)


def _refuse_options(context: typer.Context, names: tuple[str, ...], reason: str) -> None:
    """Raises ConfigurationError for the first of the options, if one was given: it would have no effect."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigurationError(f"--{name.replace('_', '-')} {reason}")


def _run(
    asked: RequestFile,
    file: AnswerFile,
    answerer: AbstractAsyncContextManager[Answerer],
    concurrency: int,
    patience: Patience,
) -> None:
    """Answers the requests that have no answer yet, and prints how many they were."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

    from gptj_dist.cli.progress import displayed
    from gptj_dist.cli.text.batch_run import BatchRun

    begin_s, num_before, num_tokens = time.monotonic(), len(file.answered), 0

    async def answer_all(display: Display) -> None:
        def take(answer: BatchAnswer) -> None:
            nonlocal num_tokens
            file.append(answer)
            num_tokens += answer.num_output_tokens
            display.progress(len(file.answered), len(file.expected))

        async with answerer as entered:
            display.progress(len(file.answered), len(file.expected))
            run = BatchRun(entered, take, display.note, patience)
            await run.run(asked.requests(without=set(file.answered)), concurrency)

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with displayed(*columns, as_text=lambda done, all_: f"{done} of {all_} requests") as display:
            asyncio.run(answer_all(display))
    except (KeyboardInterrupt, GPTJDistError):
        complain(f"{len(file.answered)} of {len(file.expected)} requests are answered; run it again to resume")
        raise
    elapsed_s = time.monotonic() - begin_s
    print(
        f"{len(file.answered) - num_before} requests answered in {elapsed_s:.1f} s, "
        f"{num_tokens:,} tokens, {num_tokens / elapsed_s:,.0f} a second"
    )
