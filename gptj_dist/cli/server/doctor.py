"""`gptj-dist doctor`: what would keep a pipeline from serving here or on a cluster, each with its cure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_dist.cli.options import DEFAULT_HOST, DEFAULT_PORT, Host, Port
from gptj_dist.cli.pipeline_settings import OPTIONS, Settings, takes_settings
from gptj_dist.config import PipelineConfig
from gptj_dist.errors import ConfigurationError

if TYPE_CHECKING:
    from gptj_dist.operate.doctor.cluster import Cluster, Finding
    from gptj_dist.stages.blueprint import Blueprint

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "bold red"}
_NO_MODEL = PipelineConfig("no model")


@takes_settings(*OPTIONS)
def doctor(
    settings: Settings,
    model: Annotated[
        str | None,
        typer.Argument(
            help="The model to serve, as for `serve`; without it, memory is not checked.", show_default=False
        ),
    ] = None,
    host: Host = DEFAULT_HOST,
    port: Port = DEFAULT_PORT,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to examine; without it this machine.", envvar="RAY_ADDRESS")
    ] = None,
) -> None:
    """Examine what serving would run on: versions, memory, ports and limits of all nodes. Exit code 1 if it would fail.

    Takes the settings of `serve`, and examines one pipeline of them. Starts nothing that stays.
    """
    config = PipelineConfig(model or _NO_MODEL.model, **settings)
    if model is None and config != _NO_MODEL:
        raise ConfigurationError("settings of a pipeline need a MODEL to go with them, such as 'demo'")
    findings = _examine(None if model is None else config, (host, port), address)
    _print(findings)
    if any(finding.severity == "failure" for finding in findings):
        raise typer.Exit(1)


def _examine(config: PipelineConfig | None, listen_at: tuple[str, int], address: str | None) -> list[Finding]:
    from gptj_dist.checkpoint.hub import resolve_model
    from gptj_dist.operate.doctor.cluster import Finding
    from gptj_dist.operate.doctor.findings import find_in_nodes
    from gptj_dist.operate.doctor.fit import find_in_plan
    from gptj_dist.operate.doctor.start import find_in_start
    from gptj_dist.operate.doctor.text import find_in_text_settings
    from gptj_dist.stages.blueprint import draw_blueprint

    blueprint: Blueprint | None = None
    why_no_plan = Finding("ok", "memory", "not checked: no MODEL was named")
    if config is not None:
        try:
            blueprint = draw_blueprint(config)
        except ConfigurationError as error:
            cure = "correct the model's files, its name or the settings"
            why_no_plan = Finding("failure", "model", str(error), cure)
    cluster = _survey(blueprint, listen_at, address)
    findings = [*find_in_nodes(cluster, config), *(find_in_start() if address is None else [])]
    if blueprint is None:
        return [*findings, why_no_plan]
    directory = resolve_model(blueprint.config.model, blueprint.config.revision)
    return [*findings, *find_in_plan(cluster, blueprint), *find_in_text_settings(directory, blueprint.model)]


def _survey(blueprint: Blueprint | None, listen_at: tuple[str, int], address: str | None) -> Cluster:
    """The cluster at the address, or this machine.

    Raises:
        ConfigurationError: no Ray answers at the address.
    """
    from gptj_dist.checkpoint.hub import local_directory
    from gptj_dist.operate.doctor.cluster import this_machine
    from gptj_dist.operate.doctor.facts import ModelQuestion, gather_facts
    from gptj_dist.operate.launch.cluster import connected

    question: ModelQuestion | None = None
    if blueprint is not None:
        model = blueprint.config.model
        question = ModelQuestion(model, blueprint.config.revision if local_directory(model) is None else None)
    if address is None:
        return this_machine(gather_facts(question, listen_at))
    with connected(address):
        from gptj_dist.operate.doctor.survey import survey_cluster

        return survey_cluster(question, listen_at)


def _print(findings: Sequence[Finding]) -> None:
    """A row for each finding, its cure below it, and the sum of them all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        table.add_row(Text(finding.severity, _COLOURS[finding.severity]), Text(finding.subject), Text(finding.what))
        if finding.cure is not None:
            table.add_row("", "", Text(f"cure: {finding.cure}", "bold"))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\n{_summary(findings)}")


def _summary(findings: Sequence[Finding]) -> str:
    numbers = Counter(finding.severity for finding in findings)
    counted = [f"{numbers[s]} {s}{'' if numbers[s] == 1 else 's'}" for s in ("failure", "warning") if numbers[s]]
    verdict = "Serving would fail" if numbers["failure"] else "Serving would work"
    return f"{verdict}{': ' if counted else ''}{', '.join(counted)}."
