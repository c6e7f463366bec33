"""Finds the end of a text that comes in pieces. Knows characters only, not tokens.

The rule: the stop string that is complete first ends the text; of several that end at the same character, the longest
is cut, that is, the one that starts first. With stops "b" and "abc" the text "xabc" ends as "xa", because "b" is
complete before "abc" is; with "c" and "abc" it ends as "x". So the result does not depend on how the text is cut into
pieces, and a complete stop string ends the text at once: to prefer what starts first, "b" would have to wait for "c".

Hidden pieces, such as the names of special tokens, are not part of the text. A stop string is found where the text
with them holds it, and where the text without them does.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator, Sequence


class StopPattern:
    """A stop string and the states that a mismatch leads to (Knuth, Morris, Pratt 1977, section 2).

    A character costs at most O(log length) steps. Preparing costs O(length); completions of one request share it.

    Args:
        text: at least one character.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.after_mismatch = _after_mismatch(text)


def prepare_stops(stops: Sequence[str]) -> tuple[StopPattern, ...]:
    """Stop strings as `StopStrings` takes them."""
    return tuple(map(StopPattern, stops))


class StopStrings:
    """Watches one output for `stops`; holds back only what may still become part of one.

    Args:
        keeps_stop: the text ends after the stop string, hidden or not, instead of before it.
    """

    def __init__(self, stops: Sequence[StopPattern], keeps_stop: bool = False) -> None:
        self._keeps_stop = keeps_stop
        self._matchers = [_Matcher(stop) for stop in stops]
        self._shown_matchers: list[_Matcher] = []
        """From the first hidden character on, they see the others alone."""
        self._held = ""
        self._num_released = 0
        """Characters, hidden or not, before those held. Places in the text count from its beginning."""
        self._places: list[int] = []
        """Of the characters held that are shown, from the first hidden one on."""
        self._is_stopped = False

    def push(self, text: str, is_shown: bool = True) -> tuple[str, bool]:
        """Takes the next piece of the text.

        Args:
            is_shown: whether the piece is part of the text, or hidden.

        Returns:
            The text that can be released now, and whether a stop string has been completed: what follows it is dropped,
            and it is as well unless it is to be kept.
        """
        if not self._matchers:
            return text if is_shown else "", False
        if self._is_stopped:
            return "", True
        if not is_shown and not self._shown_matchers:
            self._begin_to_hide()
        first_place = self._num_released + len(self._held)
        self._held += text
        if is_shown and self._shown_matchers:
            self._places += range(first_place, first_place + len(text))
        for end, char in enumerate(text, start=first_place + 1):
            # A list, not a generator: every matcher has to see the character.
            if completed := list(self._completed(char, end, is_shown)):
                self._is_stopped = True
                return self._cut(*min(completed), end), True
        return self._release(min(self._begins_of_parts())), False

    def finish(self) -> str:
        """The text that was held back, now that nothing can complete a stop string any more."""
        return "" if self._is_stopped else self._release(self._num_released + len(self._held))

    def _begin_to_hide(self) -> None:
        self._shown_matchers = list(map(copy.copy, self._matchers))
        self._places = list(range(self._num_released, self._num_released + len(self._held)))

    def _completed(self, char: str, end: int, is_shown: bool) -> Iterator[tuple[int, bool]]:
        """Where the stop strings begin that the character completes, and whether hidden characters count in them."""
        yield from ((end - matcher.length, True) for matcher in self._matchers if matcher.feed(char))
        if is_shown and self._shown_matchers:
            index = bisect_left(self._places, end)
            for matcher in self._shown_matchers:
                if matcher.feed(char):
                    yield self._places[index - matcher.length], False

    def _begins_of_parts(self) -> Iterator[int]:
        """Where what may become stop strings begins."""
        end = self._num_released + len(self._held)
        yield from (end - matcher.num_matched for matcher in self._matchers)
        yield from (self._places[-matcher.num_matched] for matcher in self._shown_matchers if matcher.num_matched)

    def _cut(self, begin: int, counts_hidden: bool, end: int) -> str:
        """The text before a stop string, with it if it is to be kept."""
        kept = self._all(begin, end) if counts_hidden else self._shown(begin, end)
        return self._shown(self._num_released, begin) + (kept if self._keeps_stop else "")

    def _release(self, end: int) -> str:
        released = self._shown(self._num_released, end)
        self._held = self._all(end, self._num_released + len(self._held))
        self._places = self._places[bisect_left(self._places, end) :]
        self._num_released = end
        return released

    def _all(self, begin: int, end: int) -> str:
        return self._held[begin - self._num_released : end - self._num_released]

    def _shown(self, begin: int, end: int) -> str:
        if not self._shown_matchers:
            return self._all(begin, end)
        places = self._places[bisect_left(self._places, begin) : bisect_left(self._places, end)]
        return "".join(self._held[place - self._num_released] for place in places)


class _Matcher:
    """How many characters of one stop string the text so far ends with."""

    def __init__(self, stop: StopPattern) -> None:
        self._stop = stop.text
        self._after_mismatch = stop.after_mismatch
        self.length = len(stop.text)
        self.num_matched = 0

    def feed(self, char: str) -> bool:
        """Takes one character; True when it completes the stop string, after which there are no more."""
        num_matched = self.num_matched
        while num_matched >= 0 and self._stop[num_matched] != char:
            num_matched = self._after_mismatch[num_matched]
        self.num_matched = num_matched + 1
        return self.num_matched == self.length


def _after_mismatch(stop: str) -> Sequence[int]:
    """For each number of matched characters the one to try when the next character does not match; -1 is none.

    Numbers that would fail at the same character are skipped.
    """
    states, border = [-1], 0
    for number in range(1, len(stop)):
        states.append(states[border] if stop[number] == stop[border] else border)
        while border >= 0 and stop[number] != stop[border]:
            border = states[border]
        border += 1
    return states
