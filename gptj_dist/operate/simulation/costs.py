"""Processor time that the coordinator and the ingress take. Measured; no model, no device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoordinatorCosts:
    """Seconds of a coordinator's one thread.

    Args:
        request_s: of a request: its call arrives, it is checked and queued, and it ends.
        plan_s: of a plan: it is made, sent, and its result received.
        running_s: of a plan, for each request that runs, whether it is in the plan or not.
        row_s: of each request in a plan: its chunk, its token, its message.
    """

    request_s: float = 0.0
    plan_s: float = 0.0
    running_s: float = 0.0
    row_s: float = 0.0


@dataclass(frozen=True, slots=True)
class IngressCosts:
    """Seconds of an ingress's one thread.

    Args:
        request_s: of a request: HTTP, JSON, tokenizer, the call of a pipeline, and the end of the answer.
        message_s: of a message with the tokens of a step.
        token_s: of each token in it: text, JSON, an event for the client.
        choice_s: of a choice among pipelines, for each of them. A thread of its own makes it, but Python runs one
            thread at a time.
        facts_s: of what a pipeline publishes, once a second.
        call_delay_s: until the pipeline has the request. Takes no time of the ingress.
    """

    request_s: float = 0.0
    message_s: float = 0.0
    token_s: float = 0.0
    choice_s: float = 0.0
    facts_s: float = 0.0
    call_delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerCosts:
    """What a server's processes take, besides the stages."""

    coordinator: CoordinatorCosts = CoordinatorCosts()
    ingress: IngressCosts = IngressCosts()


FREE = ServerCosts()
"""Nothing but stages takes time."""

MEASURED = ServerCosts(
    CoordinatorCosts(request_s=700e-6, plan_s=500e-6, running_s=0.3e-6, row_s=30e-6),
    IngressCosts(request_s=1450e-6, message_s=370e-6, token_s=47e-6, choice_s=7e-6, facts_s=380e-6, call_delay_s=2e-3),
)
"""On the 2-core machine of `docs/performance.md`, by `python -m benchmarks.front` and `benchmarks.scheduler`."""
