"""What the engine asks of a pipeline of stages, whatever runs it."""

from __future__ import annotations

from typing import Protocol

from gptj_dist.engine.plan import Plan, Result


class Executor(Protocol):
    """Computes plans, in order."""

    def submit(self, plan: Plan) -> None:
        """Sends a plan on its way; never blocks."""

    async def receive(self) -> Result:
        """The next result, in the order of the plans.

        Raises:
            StageFailedError: a stage has died; no result will ever come again.
        """
