"""What the command line says of itself: help that fits, examples that work, completion, hints for what is mistyped."""

from __future__ import annotations

import inspect
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from gptj_dist.cli import COMMANDS, app
from gptj_dist.cli.examples import EXAMPLES
from gptj_dist.cli.pipeline_settings import OPTIONS, takes_settings
from gptj_dist.config import PipelineConfig
from gptj_dist.errors import ConfigurationError
from tests.verbs import environment, run_verb

NAMES = [verb.__name__ for verbs in COMMANDS.values() for verb in verbs]


def help_of(*verb: str, columns: int) -> str:
    done = run_verb(*verb, "--help", COLUMNS=str(columns))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_verb_has_examples() -> None:
    assert set(EXAMPLES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_80_columns_and_ends_with_examples_on_lines_of_their_own(name: str) -> None:
    lines = [line.rstrip() for line in help_of(name, columns=80).splitlines()]
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("…│") for line in lines)
    examples = [line.strip() for line in lines[lines.index(" Examples:") + 1 :] if line]
    assert examples == list(EXAMPLES[name])


def test_the_verbs_are_listed_in_groups_with_a_word_on_completion() -> None:
    text = help_of(columns=80)
    assert max(map(len, text.splitlines())) <= 80
    for group in COMMANDS:
        assert f"─ {group} ─" in text
    for name in NAMES:
        assert f"│ {name} " in text
    assert "--install-completion" in text.splitlines()[-4] + text.splitlines()[-3]


def commands_of(line: str) -> Iterator[list[str]]:
    """The calls of `gptj-dist` in a line of shell."""
    for part in line.split(">")[0].split("|"):
        program, *arguments = shlex.split(part)
        if program == "gptj-dist":
            yield arguments


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_the_parser_takes_every_example(line: str) -> None:
    group = typer.main.get_group(app)
    (arguments,) = commands_of(line)
    name, *rest = arguments
    context = typer.Context(group)
    command = group.get_command(context, name)
    assert command is not None
    command.make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["servee"], "No such command 'servee'. Did you mean 'serve'?; see gptj-dist --help"),
        (["serve", "demo", "--stage", "2"], "--stages"),
        (["serve", "demo", "--dtype", "bflaot16"], "; did you mean 'bfloat16'?; see gptj-dist serve --help"),
        (["serve", "demo", "--dtype", "x"], "'x' is not one of 'auto', 'float32', 'bfloat16', 'float16'; see"),
        (["serve", "demo", "--stages", "x"], "Invalid value for '--stages': Input should be a valid integer; see"),
        (["plan"], "Missing argument 'model'; see gptj-dist plan --help"),
        (["plan", "demo", "--stages"], "Option '--stages' requires an argument; see gptj-dist plan --help"),
        (["complete", "x", "--max-token", "2"], "--max-tokens"),
        (["complete", "x", "--temperature", "nan"], "'nan' is not a finite number"),
        (["generate", "demo", "--prompt", "x", "--min-p=-inf"], "'-inf' is not a finite number"),
        (["chat", "--timeout", "1e999"], "'1e999' is not a finite number"),
        (["batch", "in", "out", "--wait", "inf"], "'inf' is not a finite number"),
        (["verify", "demo", "--tolerance", "much"], "'much' is not a finite number"),
        (["synth", "tiny", "x", "--shard-gb", "inf"], "'inf' is not a finite number"),
        (["synth", "tiny", "x", "--shard-gb", "0"], "--shard-gb must be positive, got 0"),
        (["synth", "tiny", "x", "--seed", "99999999999999999999"], "--seed"),
        (["serve", "demo", "--cpus-per-stage", "nan"], "'nan' is not a finite number"),
        (["serve", "demo", "--start-timeout-s", "nan"], "'nan' is not a finite number"),
        (["serve", "demo", "--drain-s=-1"], "-1 is negative"),
        (["stop", "--drain-s", "inf"], "'inf' is not a finite number"),
        (["batch", "in", "out", "--wait=-1"], "-1 is negative"),
    ],
)
def test_what_is_mistyped_is_refused_with_what_is_nearest(arguments: list[str], told: str) -> None:
    done = run_verb(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.startswith("gptj-dist: ")
    assert done.stderr.count("\n") == 1


def test_without_arguments_the_help_is_shown() -> None:
    done = run_verb()
    assert (done.returncode, done.stderr) == (2, "")
    assert "─ Serving ─" in done.stdout


def test_devices_and_dtypes_ignore_case() -> None:
    done = run_verb("plan", "demo", "--device", "CPU", "--dtype", "BFloat16")
    assert done.returncode == 0, done.stderr
    assert "cpu, bfloat16" in done.stdout


def completed(words: str, cwd: Path | None = None) -> list[str]:
    """What bash would offer for the last of the words."""
    variables = {"_GPTJ_DIST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys; sys.argv[0] = 'gptj-dist'; from gptj_dist.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**variables, PYTHONPATH=os.pathsep.join(sys.path)),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split()


def test_a_shell_completes_verbs_options_and_values(tmp_path: Path) -> None:
    assert completed("gptj-dist co") == ["complete", "convert"]
    assert completed("gptj-dist serve demo --dtype ") == ["auto", "float32", "bfloat16", "float16"]
    assert completed("gptj-dist serve demo --device c") == ["cpu", "cuda"]
    assert completed("gptj-dist serve demo --device cpu,cu") == ["cpu,cuda"]
    assert "--kv-cache-gb" in completed("gptj-dist batch --k")
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").touch()
    (tmp_path / "my-notes").mkdir()
    assert completed("gptj-dist serve d", tmp_path) == ["demo"]
    assert completed("gptj-dist serve m", tmp_path) == ["my-model"]


def test_settings_of_a_pipeline_are_options_in_their_place_and_arrive_as_the_pipeline_wants_them() -> None:
    seen: list[dict[str, object]] = []

    @takes_settings("layers", "kv_cache_gb", "stages")
    def verb(model: str, settings: dict[str, object], last: int = 0) -> None:
        del model, last
        seen.append(settings)

    assert list(inspect.signature(verb).parameters) == ["model", "layers", "kv_cache_gb", "stages", "last"]
    verb(model="demo", layers="14,14", kv_cache_gb="auto", stages=None)
    assert seen == [{"layers": (14, 14), "kv_cache_gb": None, "stages": None}]
    with pytest.raises(ConfigurationError, match="--layers takes numbers"):
        verb(model="demo", layers="all", kv_cache_gb="1", stages=None)


def test_the_options_defaults_are_the_pipelines() -> None:
    @takes_settings(*OPTIONS)
    def verb(settings: dict[str, object]) -> None:
        assert PipelineConfig("demo", **settings) == PipelineConfig("demo")  # type: ignore[arg-type]

    verb(**{name: parameter.default for name, parameter in inspect.signature(verb).parameters.items()})
