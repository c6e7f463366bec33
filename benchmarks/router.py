"""Simulates conversations over several pipelines: how much of their prompts is found where they are sent.

    python -m benchmarks.router                               200 conversations over 3 pipelines
    python -m benchmarks.router --sessions 60 --seed 2        fewer, and others

Router, schedulers and block pools are the real ones. Time is simulated: a step takes 12 ms and 1 ms for each row, and
pipelines publish their facts once a second, which arrive 0.2 s later. Each prompt is a system prompt, which some
conversations share, and all turns so far. Turns come to ingresses in turn (`--ingresses`), each with a router.

`hits` is the share of the prompts' tokens that the KV cache held, `of_oracle` the ratio to what a cache would hold that
all pipelines share and that loses nothing. `load` is the most rows that a pipeline computed, over the mean of all.
`same` is the share of turns that go where the turn before went. With `sessions` each turn names its conversation.
`fewest` sends each prompt to the pipeline with the fewest requests instead. `choice_us` are microseconds of a choice.
The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from typing import Any

from benchmarks.figures import machine, percentile, print_document
from gptj_dist.config import BLOCK_SIZE_TOKENS
from gptj_dist.engine.prefix import extend_keys
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduling import SchedulerConfig, TokenOutput
from gptj_dist.operate.simulation.choice import Choice, FewestRequests, RoutedChoice
from gptj_dist.operate.simulation.clock import Clock
from gptj_dist.operate.simulation.costs import CoordinatorCosts
from gptj_dist.operate.simulation.pipeline import SimulatedPipeline
from gptj_dist.operate.simulation.stages import SimulatedStages
from gptj_dist.operate.simulation.times import Edge, LineTimes
from gptj_dist.params import SamplingParams

OVERHEAD_S, ROW_S = 0.012, 0.001
NUM_SYSTEM_PROMPTS, SYSTEM_TOKENS = 8, (64, 320)
NUM_TURNS, USER_TOKENS, ANSWER_TOKENS = (2, 10), (16, 160), (16, 128)
THINKING_S = 8.0
MAX_TOKENS = 2048
VOCAB_SIZE = 50_257


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation: the tokens of its system prompt and of the user's turns, and the lengths of the answers."""

    begins_s: float
    system: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    pauses_s: tuple[float, ...]


def make_sessions(num_sessions: int, per_s: float, seed: int) -> list[Session]:
    """Conversations that begin at random times, `per_s` in a second."""
    rng = random.Random(seed)

    def text(length: tuple[int, int]) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(*length)))

    systems = [text(SYSTEM_TOKENS) for _ in range(NUM_SYSTEM_PROMPTS)]
    sessions, now_s = [], 0.0
    for _ in range(num_sessions):
        now_s += rng.expovariate(per_s)
        turns = tuple(text(USER_TOKENS) for _ in range(rng.randint(*NUM_TURNS)))
        answers = tuple(rng.randint(*ANSWER_TOKENS) for _ in turns)
        pauses = tuple(rng.expovariate(1 / THINKING_S) for _ in turns)
        system = systems[min(int(rng.expovariate(0.5)), NUM_SYSTEM_PROMPTS - 1)]
        sessions.append(Session(now_s, system, turns, answers, pauses))
    return sessions


@dataclass(slots=True)
class Outcome:
    """Of a run.

    Attributes:
        num_tokens, num_cached, num_oracle: tokens of prompts, those that were cached, those that the oracle has.
        num_rows: of each pipeline.
        choices_s: seconds of each choice.
        num_turns, num_same: turns after a conversation's first, and those that went where the one before did.
    """

    num_tokens: int = 0
    num_cached: int = 0
    num_oracle: int = 0
    num_rows: list[int] = field(default_factory=list)
    choices_s: list[float] = field(default_factory=list)
    num_turns: int = 0
    num_same: int = 0

    @property
    def of_oracle(self) -> float:
        return self.num_cached / self.num_oracle

    @property
    def load(self) -> float:
        return max(self.num_rows) / statistics.mean(self.num_rows)


class Simulation:
    """Conversations over pipelines.

    Args:
        num_ingresses: each has a `Router`; 0 has the fewest requests choose.
        has_sessions: whether turns name their conversation.
    """

    def __init__(self, num_pipelines: int, num_blocks: int, num_ingresses: int, has_sessions: bool = False) -> None:
        self._clock = Clock()
        config = SchedulerConfig(1, num_blocks, BLOCK_SIZE_TOKENS, max_batch_size=64, eos_token_ids=())
        times = LineTimes((OVERHEAD_S,), (ROW_S,))
        self._pipelines = [
            SimulatedPipeline(
                self._clock,
                config,
                SimulatedStages(self._clock, times, [Edge(0.0), Edge(0.0)]),
                CoordinatorCosts(),
                self._note_outputs,
            )
            for _ in range(num_pipelines)
        ]
        session_of = self._conversation if has_sessions else lambda _: None
        self._choice: Choice = (
            RoutedChoice(self._clock, self._pipelines, num_ingresses, session_of)
            if num_ingresses
            else FewestRequests(num_pipelines)
        )
        self._num_ingresses = max(1, num_ingresses)
        self._conversations: dict[Request, Session] = {}
        self._last: dict[Session, int] = {}
        self._request_ids = count()
        self._computed: set[bytes] = set()
        self._asked: dict[Request, tuple[Session, int, int]] = {}
        self._outcome = Outcome()

    def run(self, sessions: Sequence[Session]) -> Outcome:
        """Runs all of them to their ends."""
        for session in sessions:
            self._clock.after(session.begins_s, partial(self._ask, session, 0, session.system))
        self._clock.run()
        self._outcome.num_rows = [pipeline.num_rows for pipeline in self._pipelines]
        return self._outcome

    def _ask(self, session: Session, turn: int, before: tuple[int, ...]) -> None:
        """Sends a turn's prompt: all that was said before, and what the user adds."""
        if turn == len(session.turns) or len(before) + USER_TOKENS[1] + ANSWER_TOKENS[1] > MAX_TOKENS:
            return
        tokens = (*before, *session.turns[turn])
        params = SamplingParams(max_tokens=session.answers[turn])
        request = Request(next(self._request_ids), Prompt(tokens), params, noise_key=0)
        self._conversations[request] = session
        begin = time.perf_counter()
        index = self._choice.choose(request, self._ingress(request))
        self._outcome.choices_s.append(time.perf_counter() - begin)
        self._asked[request] = session, turn, index
        self._outcome.num_turns += session in self._last
        self._outcome.num_same += self._last.get(session) == index
        self._last[session] = index
        keys = _keys(params, tokens)
        self._outcome.num_oracle += BLOCK_SIZE_TOKENS * sum(1 for _ in takewhile(self._computed.__contains__, keys))
        self._pipelines[index].begin(request)

    def _ingress(self, request: Request) -> int:
        return request.request_id % self._num_ingresses

    def _conversation(self, request: Request) -> str:
        return str(self._conversations[request].begins_s)

    def _note_outputs(self, outputs: Sequence[TokenOutput], sent_s: float) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._clock.at(sent_s, partial(self._note_answer, output.request))

    def _note_answer(self, request: Request) -> None:
        session, turn, index = self._asked.pop(request)
        self._choice.end(request, index, self._ingress(request))
        self._outcome.num_tokens += len(request.prompt_ids)
        self._outcome.num_cached += request.num_cached_tokens
        self._computed.update(_keys(request.params, request.token_ids))
        self._clock.after(session.pauses_s[turn], partial(self._ask, session, turn + 1, tuple(request.token_ids)))


def _keys(params: SamplingParams, tokens: Sequence[int]) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, params, tokens, BLOCK_SIZE_TOKENS, (len(tokens) - 1) // BLOCK_SIZE_TOKENS)
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--pipelines", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=8192, help="KV blocks of a pipeline, of 16 tokens")
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument("--per-second", type=float, default=1.5, help="conversations that begin")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sessions = make_sessions(args.sessions, args.per_second, args.seed)
    document: dict[str, Any] = {"machine": machine(), **vars(args)}
    for name, num_ingresses in (("router", args.ingresses), ("sessions", args.ingresses), ("fewest", 0)):
        outcome = Simulation(args.pipelines, args.blocks, num_ingresses, name == "sessions").run(sessions)
        hits = outcome.num_cached / outcome.num_tokens
        document[name] = {"hits": hits, "of_oracle": outcome.of_oracle, "load": outcome.load}
        document[name]["same"] = outcome.num_same / outcome.num_turns
        if name == "router":
            micros = [1e6 * choice_s for choice_s in outcome.choices_s]
            document["choice_us"] = {"median": statistics.median(micros), "p99": percentile(micros, 99)}
    print_document("router", document)


if __name__ == "__main__":
    main()
