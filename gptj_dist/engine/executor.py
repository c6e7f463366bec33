"""The interface between the engine and whatever runs the stages of its pipeline."""

from __future__ import annotations

from typing import Protocol

from gptj_dist.engine.plan import Plan, Result


class Executor(Protocol):
    """Computes plans, in order."""

    def submit(self, plan: Plan) -> None:
        """Sends a plan to the first stage; never blocks."""

    async def receive(self) -> Result:
        """The next result, in the order of the plans.

        Raises:
            StageFailedError: a stage has died; there will be no more results.
        """
