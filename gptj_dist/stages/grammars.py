"""The masks of requests with a grammar, computed on a thread of their own while the layers are computed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
        num_tokens: of the text for which `masks` are, or are being computed; -1 before the first.
        masks: of the next token, and of those after each draft.
        matcher: used by the thread alone; None before the first mask.
    """

    request: NewRequest
    history: Sequence[int]
    num_tokens: int = -1
    masks: Future[list[GrammarMask]] | None = None
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
            self._prepare(followed, 0)

    def release(self, request_id: int) -> None:
        """Forgets a request, with or without a grammar."""
        self._requests.pop(request_id, None)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def prepare(self, chunks: Sequence[Chunk]) -> None:
        """Begins to compute the masks of the tokens that are sampled after these chunks, which are in the histories."""
        for chunk in chunks if self._requests else ():
            if chunk.samples and (followed := self._requests.get(chunk.request_id)) is not None:
                self._prepare(followed, chunk.start + chunk.num_known, drafts=chunk.drafts)

    def prepare_next(self, chunks: Sequence[Chunk], sampled: Sequence[int]) -> None:
        """Begins to compute masks for the next step, of texts of which it is known how they go on.

        Args:
            chunks: those that were sampled.
            sampled: tokens after each chunk's last token, and after each of its drafts.
        """
        row = 0
        for chunk in chunks if self._requests else ():
            followed = self._requests.get(chunk.request_id)
            if followed is not None and not chunk.num_drafts and not followed.request.params.use_beam_search:
                self._prepare(followed, chunk.start + chunk.num_known, sampled[row : row + 1])
            row += 1 + chunk.num_drafts

    def masks(self, chunk: Chunk) -> Sequence[GrammarMask | None]:
        """The masks that were prepared for a chunk; None for a request without a grammar. May wait for them."""
        followed = self._requests.get(chunk.request_id)
        if followed is None or followed.masks is None:
            return [None] * (1 + chunk.num_drafts)
        return followed.masks.result()

    def _prepare(self, followed: _Followed, stop: int, sampled: Sequence[int] = (), drafts: Sequence[int] = ()) -> None:
        """Begins to compute masks, unless that was begun before.

        Args:
            stop: position after the last token of the history that belongs to the text.
            sampled: the tokens after those.
            drafts: guesses of the tokens after those.
        """
        first = followed.request.num_prompt_tokens
        num_tokens = max(0, stop - first) + len(sampled)
        if num_tokens > followed.num_tokens or drafts:
            new_ids = [*followed.history[first + max(0, followed.num_tokens) : stop], *sampled]
            followed.num_tokens = num_tokens
            followed.masks = self._thread.submit(self._compute, followed, new_ids, drafts)

    def _compute(self, followed: _Followed, new_ids: Sequence[int], drafts: Sequence[int]) -> list[GrammarMask]:
        params = followed.request.params
        grammar = params.structured_outputs
        assert grammar is not None, "only requests with a grammar are followed"
        if followed.matcher is None:
            try:
                followed.matcher = self._grammars.result().matcher(grammar)
            except GPTJDistError:  # the request was checked where it arrived, so only this machine's files can differ
                nothing = torch.ones(self._rules.vocab_size, dtype=torch.bool)
                return [GrammarMask(nothing, is_complete=False)] * (1 + len(drafts))
        followed.matcher.consume(new_ids)
        along = followed.matcher.along(drafts)
        return [GrammarMask(self._banned(bits, may_end, params), may_end) for bits, may_end in along]

    def _banned(self, bits: bytes, may_end: bool, params: SamplingParams) -> Tensor:
        """The tokens that must not come next. Those that end the request may come exactly where the text may end."""
        vocab_size, rules = self._rules.vocab_size, self._rules
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=vocab_size, bitorder="little")
        banned = torch.from_numpy(allowed == 0)
        for token_ids, ends in ((rules.eos_token_ids, not params.ignore_eos), (params.stop_token_ids, True)):
            banned[list(token_ids)] = not (may_end and ends)
        return banned
