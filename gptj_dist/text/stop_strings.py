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
from collections.abc import Iterator, Sequence
from itertools import compress


class StopStrings:
    """Watches one output for `stops`, none of them empty; holds back only what may still become part of one.

    Args:
        keeps_stop: the text ends after the stop string, hidden or not, instead of before it.
    """

    def __init__(self, stops: Sequence[str], keeps_stop: bool = False) -> None:
        self._keeps_stop = keeps_stop
        self._matchers = [_Matcher(stop) for stop in stops]
        self._shown_matchers: list[_Matcher] = []
        """From the first hidden character on, they see the others alone."""
        self._held = ""
        self._is_shown: list[bool] = []
        """Of each character held."""
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
            self._shown_matchers = [matcher.copy() for matcher in self._matchers]
        first_end = len(self._held) + 1
        self._held += text
        self._is_shown += [is_shown] * len(text)
        for end, char in enumerate(text, start=first_end):
            # A list, not a generator: every matcher has to see the character.
            if completed := list(self._completed(char, end)):
                self._is_stopped = True
                return self._cut(*min(completed), end), True
        return self._release(min(self._begins_of_parts())), False

    def finish(self) -> str:
        """The text that was held back, now that nothing can complete a stop string any more."""
        return "" if self._is_stopped else self._release(len(self._held))

    def _completed(self, char: str, end: int) -> Iterator[tuple[int, bool]]:
        """Where the stop strings begin that the character completes, and whether hidden characters count in them."""
        yield from ((end - matcher.length, True) for matcher in self._matchers if matcher.feed(char))
        if self._is_shown[end - 1]:
            for matcher in self._shown_matchers:
                if matcher.feed(char):
                    yield self._place_before(end, matcher.length), False

    def _begins_of_parts(self) -> Iterator[int]:
        """Where what may become stop strings begins."""
        end = len(self._held)
        yield from (end - matcher.num_matched for matcher in self._matchers)
        yield from (self._place_before(end, matcher.num_matched) for matcher in self._shown_matchers)

    def _place_before(self, end: int, num_shown: int) -> int:
        """Where the last `num_shown` shown characters before `end` begin."""
        while num_shown:
            end -= 1
            num_shown -= self._is_shown[end]
        return end

    def _cut(self, begin: int, counts_hidden: bool, end: int) -> str:
        """The text before a stop string, with it if it is to be kept."""
        stop = self._held[begin:end] if counts_hidden else self._shown(begin, end)
        return self._shown(0, begin) + (stop if self._keeps_stop else "")

    def _release(self, end: int) -> str:
        released = self._shown(0, end)
        self._held, self._is_shown = self._held[end:], self._is_shown[end:]
        return released

    def _shown(self, begin: int, end: int) -> str:
        return "".join(compress(self._held[begin:end], self._is_shown[begin:end]))


class _Matcher:
    """How many characters of one stop string the text so far ends with (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._borders = _borders(stop)
        self.length = len(stop)
        self.num_matched = 0

    def copy(self) -> _Matcher:
        """One that has seen the same characters."""
        return copy.copy(self)

    def feed(self, char: str) -> bool:
        """Takes one character; True when it completes the stop string."""
        self.num_matched = _advance(self._stop, self._borders, self.num_matched, char)
        return self.num_matched == self.length


def _advance(stop: str, borders: Sequence[int], num_matched: int, char: str) -> int:
    while num_matched and stop[num_matched] != char:
        num_matched = borders[num_matched - 1]
    return num_matched + (stop[num_matched] == char)


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for char in stop[1:]:
        borders.append(_advance(stop, borders, borders[-1], char))
    return borders
