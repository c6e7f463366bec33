"""The masks of requests with a grammar, computed on a thread of their own while the layers are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptj_dist.engine.plan import Chunk, NewRequest
from gptj_dist.errors import GPTJDistError
from gptj_dist.model.sampler import GrammarMask
from gptj_dist.params import SamplingParams
from gptj_dist.text.grammar import Grammars, Matcher
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.token_rules import TokenRules


@dataclass(slots=True)
class _Followed:
    """A request whose text is followed.

    Attributes:
        num_tokens: of the text for which `mask` is, or is being computed; -1 before the first.
        matcher: used by the thread alone; None before the first mask.
    """

    request: NewRequest
    history: Sequence[int]
    num_tokens: int = -1
    mask: Future[GrammarMask] | None = None
    matcher: Matcher | None = None


class GrammarMasks:
    """Follows the texts of requests. A text is known by its tokens alone, so it can be followed anew at any time.

    Args:
        rules: the model's, for its tokens.
    """

    def __init__(self, rules: TokenRules) -> None:
        self._rules = rules
        self._requests: dict[int, _Followed] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._grammars: Future[Grammars] = Future()

    def load(self, directory: Path) -> None:
        """Begins to read the tokenizer of a checkpoint. Comes before `add`."""
        self._grammars = self._thread.submit(lambda: Tokenizer.load(directory).grammars)

    def add(self, request: NewRequest, history: Sequence[int]) -> None:
        """Follows a request from now on, if it has a grammar, and begins with the mask of its first token.

        Args:
            history: its tokens so far, which grow.
        """
        if request.params.structured_outputs is not None:
            self._requests[request.request_id] = followed = _Followed(request, history)
            self._prepare(followed, ())

    def release(self, request_id: int) -> None:
        """Forgets a request, with or without a grammar."""
        self._requests.pop(request_id, None)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def prepare(self, chunks: Sequence[Chunk], sampled: Sequence[int] = ()) -> None:
        """Begins to compute the masks of the next tokens.

        Args:
            sampled: tokens that are not in the histories yet, one for each of the chunks that are sampled; those of
                beams do not count.
        """
        if self._requests:
            for chunk, token_ids in zip(_sampled(chunks), chain(([id] for id in sampled), repeat([])), strict=False):
                followed = self._requests.get(chunk.request_id)
                if followed is not None and not (token_ids and followed.request.params.use_beam_search):
                    self._prepare(followed, token_ids)

    def mask(self, request_id: int) -> GrammarMask | None:
        """The mask that was prepared last; None for a request without a grammar. May wait for it."""
        followed = self._requests.get(request_id)
        return None if followed is None or followed.mask is None else followed.mask.result()

    def _prepare(self, followed: _Followed, sampled: Sequence[int]) -> None:
        """Begins to compute the mask after the history and the sampled tokens, unless it was begun before."""
        num_prompt_tokens = followed.request.num_prompt_tokens
        num_tokens = max(0, len(followed.history) - num_prompt_tokens) + len(sampled)
        if num_tokens > followed.num_tokens:
            new_ids = [*followed.history[num_prompt_tokens + max(0, followed.num_tokens) :], *sampled]
            followed.num_tokens = num_tokens
            followed.mask = self._thread.submit(self._compute, followed, new_ids)

    def _compute(self, followed: _Followed, new_ids: Sequence[int]) -> GrammarMask:
        params = followed.request.params
        grammar = params.structured_outputs
        assert grammar is not None, "only requests with a grammar are followed"
        if followed.matcher is None:
            try:
                followed.matcher = self._grammars.result().matcher(grammar)
            except GPTJDistError:  # the request was checked where it arrived, so only this machine's files can differ
                return GrammarMask(torch.ones(self._rules.vocab_size, dtype=torch.bool), is_complete=False)
        followed.matcher.consume(new_ids)
        bits, may_end = followed.matcher.next_tokens()
        return GrammarMask(self._banned(bits, may_end, params), may_end)

    def _banned(self, bits: bytes, may_end: bool, params: SamplingParams) -> Tensor:
        """The tokens that must not come next. Those that end the request may come exactly where the text may end."""
        vocab_size, rules = self._rules.vocab_size, self._rules
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=vocab_size, bitorder="little")
        banned = torch.from_numpy(allowed == 0)
        for token_ids, ends in ((rules.eos_token_ids, not params.ignore_eos), (params.stop_token_ids, True)):
            banned[list(token_ids)] = not (may_end and ends)
        return banned


def _sampled(chunks: Sequence[Chunk]) -> Iterator[Chunk]:
    return (chunk for chunk in chunks if chunk.samples)
