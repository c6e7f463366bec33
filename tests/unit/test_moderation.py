"""A moderator that hangs, in its own thread or on the loop, ends its request in time and stops no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gptj_dist.answers.moderation import (
    MAX_THREADS,
    ContentRefusedError,
    Moderate,
    Moderation,
    Role,
    load_moderation,
)
from gptj_dist.answers.threads import Threads
from gptj_dist.errors import ConfigurationError
from tests.front_app import WAIT_S, FrontApp, eventually, front_app


def hanging(word: str, is_async: bool) -> tuple[Moderate, threading.Event]:
    """A moderator that does not return from texts with the word, and what ends that."""
    end = threading.Event()

    def block(text: str, _: Role) -> None:
        if word in text:
            end.wait()

    async def wait(text: str, _: Role) -> None:
        if word in text:
            await asyncio.Event().wait()

    return (wait if is_async else block), end


def run(moderation: Moderation, scenario: Callable[[FrontApp], Awaitable[None]]) -> None:
    async def main() -> None:
        async with front_app(moderation) as app:
            await scenario(app)

    asyncio.run(main())


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Once", "max_tokens": 4, **fields}


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("hangs_on_output", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_hanging_moderator_is_bound_by_the_requests_timeout(
    is_async: bool, hangs_on_output: bool, stream: bool
) -> None:
    moderate, end = hanging("a" if hangs_on_output else "HANG", is_async)

    async def scenario(app: FrontApp) -> None:
        prompt = "HANG" if not hangs_on_output else "b"
        response = await app.client.post("/v1/completions", json=body(prompt=prompt, timeout_s=0.05, stream=stream))
        assert response.status_code == 408
        assert response.json()["error"]["param"] == "timeout_s"
        assert (await app.client.get("/health")).status_code == 200
        assert app.source.num_open == 0
        end.set()

    run(Moderation(moderate, timeout_s=WAIT_S), scenario)


@pytest.mark.parametrize("is_async", [True, False])
def test_a_hanging_moderator_is_bound_by_a_limit_of_its_own(is_async: bool) -> None:
    moderate, end = hanging("HANG", is_async)

    async def scenario(app: FrontApp) -> None:
        response = await app.client.post("/v1/completions", json=body(prompt="HANG"))
        assert response.status_code == 503
        error = response.json()["error"]
        assert error["code"] == "moderation_timeout"
        assert "0.05 seconds" in error["message"]
        assert not app.source.asked
        end.set()

    run(Moderation(moderate, timeout_s=0.05), scenario)


def test_a_timeout_within_the_moderator_is_its_failure_and_not_the_limit() -> None:
    async def fail(_text: str, _role: Role) -> None:
        raise TimeoutError("its own")

    async def scenario(app: FrontApp) -> None:
        response = await app.client.post("/v1/completions", json=body(timeout_s=WAIT_S))
        assert response.status_code == 500

    run(Moderation(fail), scenario)


def test_a_plain_moderator_that_blocks_its_thread_stops_no_other_request() -> None:
    """The other request is what lets the moderator go on, so this ends only if it is answered meanwhile."""
    moderate, end = hanging("HANG", is_async=False)

    async def scenario(app: FrontApp) -> None:
        blocked = asyncio.create_task(app.client.post("/v1/completions", json=body(prompt="HANG")))
        other = await app.client.post("/v1/completions", json=body())
        assert other.status_code == 200
        assert not blocked.done()
        end.set()
        assert (await blocked).status_code == 200

    run(Moderation(moderate, timeout_s=WAIT_S), scenario)


def test_more_hanging_calls_than_threads_fail_in_time_and_leave_no_request_behind() -> None:
    moderate, end = hanging("HANG", is_async=False)

    async def scenario(app: FrontApp) -> None:
        calls = [
            app.client.post("/v1/completions", json=body(prompt="HANG", timeout_s=1)) for _ in range(MAX_THREADS + 3)
        ]
        assert {response.status_code for response in await asyncio.gather(*calls)} == {408}
        assert (await app.client.get("/health")).status_code == 200
        end.set()
        assert (await app.client.post("/v1/completions", json=body())).status_code == 200

    run(Moderation(moderate, timeout_s=WAIT_S), scenario)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waits_for", ["moderator", "token"])
def test_a_client_that_leaves_before_the_first_token_is_no_longer_in_flight(stream: bool, waits_for: str) -> None:
    moderate, _ = hanging("HANG", is_async=True)

    async def scenario(app: FrontApp) -> None:
        app.source.may_go_on.clear()
        prompt = "HANG" if waits_for == "moderator" else "b"
        calling = asyncio.create_task(app.client.post("/v1/completions", json=body(prompt=prompt, stream=stream)))
        await eventually(lambda: bool(app.source.num_open if waits_for == "token" else app.metrics.num_in_flight))
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        await eventually(lambda: not app.metrics.num_in_flight and not app.source.num_open)
        assert app.metrics.num_responses["POST", "/v1/completions", 499] == 1

    run(Moderation(moderate, timeout_s=WAIT_S), scenario)


@pytest.mark.parametrize(
    "path", ["", "json", "json:", "json:no_such_name", "json:__name__", ".json:loads", "no_such_module:f"]
)
def test_a_moderator_that_is_not_there_is_refused_by_its_path(path: str) -> None:
    with pytest.raises(ConfigurationError, match=f"moderation '{path}'"):
        load_moderation(path)


def test_a_moderator_is_found_by_its_path() -> None:
    async def main() -> None:
        with pytest.raises(ContentRefusedError, match="the prompt was refused: UNWANTED"):
            await load_moderation("tests.unit.test_moderation:shout").check_prompt("unwanted")

    asyncio.run(main())


def shout(text: str, _: Role) -> str:
    return text.upper()


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


class TestThreads:
    def test_a_function_runs_in_another_thread_and_its_result_or_error_is_the_callers(self) -> None:
        async def main() -> None:
            threads = Threads(1, "t")
            assert await threads.run(threading.get_ident) != threading.get_ident()
            with pytest.raises(KeyError):
                await threads.run(lambda: {"b": 1}["a"])

        asyncio.run(main())

    def test_threads_are_used_again(self) -> None:
        async def main() -> None:
            threads = Threads(100, "t")
            idents = {await threads.run(threading.get_ident) for _ in range(100)}
            assert len(idents) < 20  # a thread is free a moment after its result is there

        asyncio.run(main())

    def test_more_calls_than_threads_wait_and_those_given_up_do_not_begin(self) -> None:
        async def main() -> None:
            threads, end, begun = Threads(1, "t"), threading.Event(), []
            first = asyncio.create_task(threads.run(end.wait))
            given_up = asyncio.create_task(threads.run(lambda: begun.append("given up")))
            last = asyncio.create_task(threads.run(lambda: begun.append("last")))
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            end.set()
            await asyncio.gather(first, last)
            assert begun == ["last"]

        asyncio.run(main())

    def test_calls_that_got_no_thread_leave_room_for_those_that_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            threads = Threads(2, "t")
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", no_thread)
                for _ in range(3):
                    with pytest.raises(RuntimeError, match="can't start new thread"):
                        await threads.run(int)
            async with asyncio.timeout(WAIT_S):
                assert await threads.run(lambda: 5) == 5

        asyncio.run(main())

    def test_without_another_thread_a_call_waits_for_one_that_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            threads, end = Threads(2, "t"), threading.Event()
            first = asyncio.create_task(threads.run(end.wait))
            await asyncio.sleep(0)
            monkeypatch.setattr(threading.Thread, "start", no_thread)
            second = asyncio.create_task(threads.run(lambda: 5))
            await asyncio.sleep(0)
            end.set()
            async with asyncio.timeout(WAIT_S):
                assert (await first, await second) == (True, 5)

        asyncio.run(main())

    def test_a_thread_that_hangs_does_not_keep_the_process(self) -> None:
        """In a process of its own, which ends."""
        import subprocess
        import sys

        script = (
            "import asyncio, threading\n"
            "from gptj_dist.answers.threads import Threads\n"
            "async def main():\n"
            "    try:\n"
            "        await asyncio.wait_for(Threads(1, 't').run(threading.Event().wait), 0.01)\n"
            "    except TimeoutError:\n"
            "        print('over')\n"
            "asyncio.run(main())\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S)
        assert (done.returncode, done.stdout.strip()) == (0, "over"), done.stderr
