"""Finds the end of a text that comes in pieces. Knows characters only, not tokens.

The rule: the stop string that is complete first ends the text; of several that end at the same character, the longest
is cut, that is, the one that starts first. With stops "b" and "abc" the text "xabc" ends as "xa", because "b" is
complete before "abc" is; with "c" and "abc" it ends as "x". So the result does not depend on how the text is cut into
pieces, and a complete stop string ends the text at once: to prefer what starts first, "b" would have to wait for "c".
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one output for `stops`, none of them empty; holds back only what may still become part of one.

    Args:
        keeps_stop: the text ends behind the stop string, not before it.
    """

    def __init__(self, stops: Sequence[str], keeps_stop: bool = False) -> None:
        self._keeps_stop = keeps_stop
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self._is_stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece of the text.

        Returns:
            The text that can be released now, and whether a stop string has been completed: what follows it is dropped,
            and it is as well unless it is to be kept.
        """
        if not self._matchers:
            return text, False
        if self._is_stopped:
            return "", True
        window = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            # A list, not a generator: every matcher has to see the character.
            completed = [matcher.length for matcher in self._matchers if matcher.feed(char)]
            if completed:
                self._held, self._is_stopped = "", True
                return window[: end if self._keeps_stop else end - max(completed)], True
        cut = len(window) - max(matcher.num_matched for matcher in self._matchers)
        self._held = window[cut:]
        return window[:cut], False

    def finish(self) -> str:
        """The text that was held back, now that nothing can complete a stop string any more."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """How many characters of one stop string the text so far ends with (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._borders = _borders(stop)
        self.length = len(stop)
        self.num_matched = 0

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
