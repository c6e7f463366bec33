"""The text of one completion, from its tokens: characters whole, stop strings cut, tokens counted. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence

from gptj_dist.text.detokenizer import Detokenizer
from gptj_dist.text.stop_strings import StopPattern, StopStrings
from gptj_dist.text.tokenizer import Tokenizer


class TextOutput:
    """Turns the tokens of one completion into text as they come.

    Args:
        stops: strings that end the text; not looked for in the text of the first `min_tokens` tokens. The names of
            special tokens can complete one, even where they are left out of the text.
        keeps_stop: what ended the text, a string or a token, is part of it.
        skips_special: special tokens have no text.

    Attributes:
        num_tokens: tokens that the text was made of, the one that completed a stop string included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[StopPattern],
        min_tokens: int,
        keeps_stop: bool = False,
        skips_special: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skips_special
        self._detokenizer = Detokenizer(tokenizer, skips_special)
        self._stops = StopStrings(stops, keeps_stop)
        self._min_tokens = min_tokens
        self._keeps_stop = keeps_stop
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int], is_last: bool, is_ended_by_token: bool = False) -> tuple[str, bool]:
        """Takes tokens, one by one, so that the result does not depend on how many come at once.

        Args:
            is_last: nothing follows.
            is_ended_by_token: the last of the tokens is there to end the text.

        Returns:
            The text that can be shown now, and whether a stop string has ended it.
        """
        released = []
        for number, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            if is_ended_by_token and number == len(token_ids) and not self._keeps_stop:
                break
            text, is_stopped = self._take(token_id)
            released.append(text)
            if is_stopped:
                return "".join(released), True
        if not is_last:
            return "".join(released), False
        text, is_stopped = self._watch(self._detokenizer.finish())
        released += [text, self._stops.finish()]
        return "".join(released), is_stopped

    def _take(self, token_id: int) -> tuple[str, bool]:
        if self._skips_special and (name := self._tokenizer.special_name(token_id)):
            return self._watch(name, is_shown=False)
        return self._watch(self._detokenizer.push([token_id]))

    def _watch(self, text: str, is_shown: bool = True) -> tuple[str, bool]:
        if self.num_tokens <= self._min_tokens:
            return text if is_shown else "", False
        return self._stops.push(text, is_shown)
