"""`gptj-dist plan --devices ... --rate ...`: how many pipelines of how many stages serve a load best, simulated."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gptj_dist.config import PipelineConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.simulation.deployment import Deployment, deployments, simulate
from gptj_dist.operate.simulation.load import Lengths, OpenLoop
from gptj_dist.operate.simulation.outcome import Outcome
from gptj_dist.operate.tables import open_table
from gptj_dist.planning.devices import DeviceSpec
from gptj_dist.planning.forecast import Workload

NUM_REQUESTS = 600
LEAST_S = 60.0
"""Requests that are simulated, and for how long they come at least."""

MOST_REQUESTS = 6_000
SPREAD = 0.8
"""Of the lengths, see `Lengths`."""


def print_simulation(
    config: PipelineConfig, workload: Workload, devices: Sequence[DeviceSpec], rate: float, prompt: int, output: int
) -> None:
    """Simulates each way to make pipelines of the devices, and prints what requests at this rate would see.

    Args:
        rate: requests a second.
        prompt, output: their tokens, on average.

    Raises:
        ConfigurationError: the lengths exceed the context window, or the model fits no way.
    """
    if prompt + output > workload.max_model_len:
        raise ConfigurationError(
            f"--prompt-tokens {prompt} and --output-tokens {output} exceed the longest request, "
            f"{workload.max_model_len} tokens"
        )
    num_requests = min(MOST_REQUESTS, max(NUM_REQUESTS, round(rate * LEAST_S)))
    load = OpenLoop(rate, num_requests, Lengths(prompt, output, SPREAD, workload.max_model_len))
    console = Console(markup=False, emoji=False)
    found: list[tuple[Deployment, Outcome]] = []
    for deployment in deployments(workload, devices):
        count = len(deployment.pipelines)
        with console.status(f"simulating {count} pipeline{'s' * (count > 1)} ..."):
            found.append((deployment, simulate(workload, deployment, load, config.max_batch_size)))
    console.print(_table(found))
    for line in _remarks(found, rate, prompt, output, num_requests):
        console.print(line, highlight=False)


def _table(found: Sequence[tuple[Deployment, Outcome]]) -> Table:
    times = ("first token", "99 %", "each token", "99 %")
    table = open_table("pipelines", "stages", numbers=("tokens/s", *times, "busiest"))
    for deployment, outcome in found:
        stages = "-".join(map(str, reversed(deployment.num_stages)))
        cells = [_ms(seconds) for seconds in (*outcome.first_token_s, *outcome.token_s)]
        name, share = max(outcome.busy.items(), key=lambda item: item[1])
        table.add_row(
            str(len(deployment.pipelines)),
            stages,
            f"{outcome.tokens_per_s:,.0f}",
            *cells,
            f"{name} {share:.0%}" if outcome.keeps_up else "queue grows",
        )
    return table


def _remarks(
    found: Sequence[tuple[Deployment, Outcome]], rate: float, prompt: int, output: int, num_requests: int
) -> list[str]:
    good = [(deployment, outcome) for deployment, outcome in found if outcome.keeps_up]
    if good:
        first = min(good, key=lambda pair: pair[1].first_token_s[1])
        later = min(good, key=lambda pair: pair[1].token_s[1])
        lines = [
            f"In 99 of 100 requests the first token comes soonest from {_name(first[0])}, "
            f"the others from {_name(later[0])}."
        ]
    else:
        lines = [f"No way of using these devices keeps up with {rate:g} requests/s: the queue grows."]
    return [
        *lines,
        f"Simulated: {num_requests} requests at random times, {rate:g} a second, with {prompt} tokens of prompt and "
        f"{output} of output on average; different prompts; one ingress. Each stage takes the time of the planner's "
        "formula; coordinators and the ingress take what was measured on one machine. Times in ms: the median, and "
        "what 99 % stay below. See docs/simulation.md for how far it is off.",
    ]


def _name(deployment: Deployment) -> str:
    count, stages = len(deployment.pipelines), " or ".join(map(str, reversed(deployment.num_stages)))
    return f"{count} pipeline{'s' * (count > 1)} of {stages} stage{'s' * (deployment.num_stages != (1,))}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
