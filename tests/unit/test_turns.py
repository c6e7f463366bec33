"""What is ready at the same time is spread over turns of the event loop."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from starlette.types import Message, Receive, Scope, Send

from gptj_dist.serving.http.middleware import InTurns

NUM_CALLS = 200


async def send(_: Message) -> None:
    pass


@pytest.mark.parametrize("leaves", [False, True])
def test_of_calls_that_come_or_leave_together_one_goes_on_in_a_turn_and_the_first_comes_first(leaves: bool) -> None:
    async def run() -> list[int | None]:
        begun: list[int | None] = []
        may_leave = asyncio.Event()

        async def leave() -> Message:
            await may_leave.wait()
            return {"type": "http.disconnect"}

        async def app(scope: Scope, receive: Receive, _send: Send) -> None:
            if leaves:
                if scope["number"] == NUM_CALLS - 1:
                    asyncio.get_running_loop().call_soon(may_leave.set)
                await receive()
            begun.append(scope["number"])

        async def count_turns() -> None:
            while True:
                await asyncio.sleep(0)
                begun.append(None)

        in_turns = InTurns(app)
        counting = asyncio.create_task(count_turns())
        await asyncio.gather(*(in_turns({"number": number}, leave, send) for number in range(NUM_CALLS)))
        counting.cancel()
        return begun

    begun = asyncio.run(run())
    assert [number for number in begun if number is not None] == list(range(NUM_CALLS))
    assert all(None in (one, next_) for one, next_ in pairwise(begun))


def test_a_call_without_a_body_does_not_wait_for_those_with_one() -> None:
    async def run() -> list[str]:
        begun: list[str] = []

        async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
            begun.append(scope["method"])

        async def receive() -> Message:
            return {"type": "http.request"}

        in_turns = InTurns(app)
        methods = ["POST"] * NUM_CALLS + ["GET"]
        await asyncio.gather(*(in_turns({"method": method}, receive, send) for method in methods))
        return begun

    assert asyncio.run(run()).index("GET") <= 2
