"""Guesses the next tokens of a request: those that followed the same tokens before. Knows no plans and no clock.

Guesses cost rows of a micro-batch, so a request has as many of them as have been worth it lately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise, takewhile

MAX_DRAFTS = 16
"""The most drafts of a request in a micro-batch."""

MEMORY_TOKENS = 16.0
"""Drafts after which earlier ones count half or less."""

FIRST_WAIT = 200
LONGEST_WAIT = 3200
"""Drafts that are not worth it and not made, until one is made to see whether that has changed; for a row that takes as
long as a token. A trial costs at most half a percent of the time of the tokens before it, however dear rows are."""

LONGEST_MATCH = 32
MOST_MATCHES = 16
"""Limits of the search, in tokens and in places where the last two tokens stood before."""

_GAP = -1
"""No token: stands between two texts."""


class Lookup:
    """Finds the longest run of tokens that ends a text and stood in it before; of equally long ones the latest.

    As long as the run goes on, a token takes no search.

    Args:
        before: another text to search, which comes before.
    """

    def __init__(self, before: Sequence[int] = ()) -> None:
        self._text: list[int] = []
        self._last: dict[tuple[int, int], int] = {}  # by two tokens: the index after the last place where they stand
        self._earlier: list[int] = [0, 0]  # by that index: the one of the place before, or 0
        self._start = 0
        self._place = 0  # the index after the place where the run stood before; 0 if it is not known
        if before:
            self.extend([*before, _GAP])
            self._start = len(self._text)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds tokens at the end of the text."""
        text = self._text
        for token_id in token_ids:
            self._place = self._place + 1 if self._place and text[self._place] == token_id else 0
            text.append(token_id)
            if len(text) > 1:
                pair = (text[-2], token_id)
                self._earlier.append(self._last.get(pair, 0))
                self._last[pair] = len(text)

    @property
    def num_tokens(self) -> int:
        """Of the text, without the one before it."""
        return len(self._text) - self._start

    @property
    def has_run(self) -> bool:
        """Whether there is one, of two tokens or more."""
        return self._place > 0 or (len(self._text) > 1 and self._earlier[-1] > 0)

    def following(self, most: int) -> list[int]:
        """What followed the run, at most `most` tokens. A run that repeats itself goes on."""
        if not self.has_run:
            return []
        self._place = self._place or self._search()
        found = islice(cycle(self._text[self._place : self._place + most]), most)
        return list(takewhile(lambda token_id: token_id != _GAP, found))

    def _search(self) -> int:
        stop = len(self._text)
        place, longest = 0, 0
        candidate = self._earlier[stop]
        for _ in range(MOST_MATCHES):
            if not candidate or longest == LONGEST_MATCH:
                break
            if (length := self._equal(candidate, stop)) > longest:
                place, longest = candidate, length
            candidate = self._earlier[candidate]
        return place

    def _equal(self, place: int, stop: int) -> int:
        """Tokens before `place` and before `stop` that are equal."""
        text, length = self._text, 2
        limit = min(place, LONGEST_MATCH)
        while length < limit and text[place - 1 - length] == text[stop - 1 - length]:
            length += 1
        return length


@dataclass(slots=True)
class Chance:
    """How often drafts have been accepted lately, and so how many are worth it.

    Attributes:
        accepted, rejected: numbers of drafts; those before make room for later ones.
        wait: drafts to leave out before one is tried; `num_left_out` have been.
    """

    accepted: float = 1.0
    rejected: float = 1.0
    wait: int = FIRST_WAIT
    num_left_out: int = 0

    def num_worthwhile(self, row_share: float) -> int:
        """Drafts that are worth their rows: the j-th is if j drafts are accepted more often than `row_share`."""
        chance = self.accepted / (self.accepted + self.rejected)
        number = 0
        while number < MAX_DRAFTS and chance ** (number + 1) > row_share:
            number += 1
        if number:
            return number
        self.num_left_out += 1
        if self.num_left_out < self.wait * row_share:
            return 0
        self.num_left_out = 0
        return 1

    def note(self, num_drafts: int, num_accepted: int) -> None:
        """Takes the outcome of drafts. Those after the first rejected one count for nothing."""
        is_rejected = num_accepted < num_drafts
        self.accepted += num_accepted
        self.rejected += is_rejected
        scale = min(1.0, MEMORY_TOKENS / (self.accepted + self.rejected))
        self.accepted, self.rejected = scale * self.accepted, scale * self.rejected
        self.wait = FIRST_WAIT if num_accepted else min(2 * self.wait, LONGEST_WAIT)


class Drafter:
    """Makes the drafts of one request, which has at most one chunk with drafts in flight.

    Args:
        prompt_ids: the request's.
        prediction_ids: what its client expects to follow.

    Attributes:
        may_be_known: whether its text may be the one of an earlier request.
    """

    def __init__(self, prompt_ids: Sequence[int], prediction_ids: Sequence[int] = ()) -> None:
        self.may_be_known = True
        self._lookup = Lookup((*prompt_ids[-LONGEST_MATCH:], *prediction_ids) if prediction_ids else ())
        self._chance = Chance()

    def draft(
        self, token_ids: Sequence[int], most: int, row_share: float, known_ids: Sequence[int] = ()
    ) -> Sequence[int]:
        """Guesses what follows.

        Args:
            token_ids: the request's prompt and all its tokens so far.
            most: limit of the number of drafts.
            row_share: share of a step's time that its rows take, as the request's tokens share it.
            known_ids: what followed in an earlier text that is the same up to here.
        """
        if not known_ids:
            self._lookup.extend(token_ids[self._lookup.num_tokens :])
            if not self._lookup.has_run:
                return ()
        most = min(most, self._chance.num_worthwhile(row_share))
        return (known_ids[:most] or self._lookup.following(most)) if most else ()

    def note(self, num_drafts: int, num_accepted: int) -> None:
        """Takes the outcome of the last drafts."""
        self._chance.note(num_drafts, num_accepted)


class Foretelling:
    """Counts the tokens of a completion that a prediction has foretold: those that follow in it on the last ones."""

    def __init__(self, prediction_ids: Sequence[int]) -> None:
        self._prediction_ids = tuple(prediction_ids)
        self._place_after = {pair: index for index, pair in enumerate(pairwise(prediction_ids), 2)}
        self._place = 0
        self._last = _GAP

    def count(self, token_ids: Sequence[int]) -> int:
        """How many of the completion's next tokens were foretold."""
        if not self._prediction_ids:
            return 0
        number = 0
        for token_id in token_ids:
            if self._prediction_ids[self._place : self._place + 1] == (token_id,):
                number += 1
                self._place += 1
            else:
                self._place = self._place_after.get((self._last, token_id), len(self._prediction_ids))
            self._last = token_id
        return number
