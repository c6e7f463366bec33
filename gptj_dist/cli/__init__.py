"""The command line, a module per command. Each imports what it needs when it is called, so that `--help` is quick."""

from __future__ import annotations

import inspect as inspect_
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Annotated

import typer
from typer.exceptions import TyperException

from gptj_dist import __version__
from gptj_dist.cli.checkpoints.adapter import adapter
from gptj_dist.cli.checkpoints.convert import convert
from gptj_dist.cli.checkpoints.download import download
from gptj_dist.cli.checkpoints.drift import drift
from gptj_dist.cli.checkpoints.inspect import inspect
from gptj_dist.cli.checkpoints.synth import synth
from gptj_dist.cli.checkpoints.verify import verify
from gptj_dist.cli.cluster.join import join
from gptj_dist.cli.cluster.leave import leave
from gptj_dist.cli.cluster.nodes import nodes
from gptj_dist.cli.cluster.up import up
from gptj_dist.cli.examples import EXAMPLES
from gptj_dist.cli.server.doctor import doctor
from gptj_dist.cli.server.key import key
from gptj_dist.cli.server.plan import plan
from gptj_dist.cli.server.repartition import repartition
from gptj_dist.cli.server.serve import serve
from gptj_dist.cli.server.status import status
from gptj_dist.cli.server.stop import stop
from gptj_dist.cli.server.top import top
from gptj_dist.cli.streams import complain, flush_output, os_error_text, prepare_streams
from gptj_dist.cli.text.batch import batch
from gptj_dist.cli.text.chat import chat
from gptj_dist.cli.text.complete import complete
from gptj_dist.cli.text.generate import generate
from gptj_dist.cli.usage_errors import usage_error_text
from gptj_dist.errors import ConfigurationError, GPTJDistError, InvalidRequestError, internal_error

FAILED = 1
CANNOT_WORK = 2

COMMANDS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "Serving": (serve, stop, status, top, repartition, plan, doctor, key),
    "Clusters": (up, join, nodes, leave),
    "Text": (complete, chat, batch, generate),
    "Checkpoints": (download, inspect, convert, verify, drift, synth, adapter),
}
"""The groups of commands in `--help`."""


def _help_of(command: Callable[..., None]) -> str:
    """Its docstring, with the lines of a paragraph joined: typer would keep the breaks of all but the first."""
    paragraphs = inspect_.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


app = typer.Typer(
    help="Serves GPT-J, and every checkpoint of its architecture, as a pipeline of stages.",
    epilog="gptj-dist COMMAND --help has examples. gptj-dist --install-completion lets the Tab key complete commands, "
    "options and values.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for panel, commands in COMMANDS.items():
    for command in commands:
        epilog = "\n".join(["Examples:", *EXAMPLES[command.__name__]])
        app.command(help=_help_of(command), epilog=epilog, rich_help_panel=panel)(command)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"gptj-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    # `_call` takes it, wherever it is in the line.
    debug: Annotated[bool, typer.Option("--debug", help="With an error, show where it was raised.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `gptj-dist`. Exit codes:

    0    done
    1    the command failed, or its check found something wrong
    2    it cannot work as it was called: arguments, settings, the model's files
    130  Ctrl-C

    Every error is one line on standard error.
    """
    prepare_streams()
    exit_code = _call()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # no traceback while a slow reader takes the rest
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    error = flush_output()
    if error is not None and exit_code == 0:
        exit_code = FAILED
        if not isinstance(error, BrokenPipeError):  # a reader who leaves knows it
            complain(os_error_text(error))
    sys.exit(exit_code)


def _call() -> int:
    """Runs the command that the arguments name. Returns its exit code."""
    arguments, is_debug = _without_debug(sys.argv[1:])
    try:
        code = app(arguments, standalone_mode=False)  # else typer shows errors itself, each in a box of six lines
        return code if isinstance(code, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED
    except TyperException as error:
        if error.format_message():  # there is none where the help was shown in place of it
            complain(usage_error_text(error, next(filter(_is_command, arguments), None)))
        return CANNOT_WORK
    except typer.Abort:
        complain("the input ended")
        return FAILED
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        complain(_told(error, is_debug))
        return CANNOT_WORK if isinstance(error, ConfigurationError | InvalidRequestError) else FAILED


def _is_command(argument: str) -> bool:
    return any(argument == command.__name__ for commands in COMMANDS.values() for command in commands)


def _told(error: Exception, is_debug: bool) -> str:
    """An error in a line."""
    if isinstance(error, GPTJDistError):
        return str(error)
    if isinstance(error, OSError):
        return os_error_text(error)
    return f"{internal_error(error)}{'' if is_debug else '; --debug shows where'}"


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, which may be anywhere before a `--`; and whether it was there."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return options + arguments[end:], len(options) < end
