"""The engine's view of a pipeline of stages: plans go in, results come out."""

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
            StageFailedError: a stage has died. No result follows.
        """
