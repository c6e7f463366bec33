"""Which tokens may come next in a text that must match a schema, an expression or a grammar, by llguidance.

Tokens are compared as bytes, so a text may be cut into tokens in any way that a model likes: none is forced. No input
raises an error of llguidance's, and its limits bound the time of each call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from, regex_to_lark

from gptj_dist.errors import InvalidRequestError, one_line
from gptj_dist.params import Grammar
from gptj_dist.text.exact_schema import exact_schema

NUM_KEPT = 64
"""Grammars that are kept: compiled, or why they are refused."""

NUM_PROBED = 3
"""Tokens that are tried before a grammar is accepted."""

LIMITS, JSON_LIMITS = (
    LLParserLimits(
        max_grammar_size=size,
        max_items_in_row=items // 10,
        step_max_items=items,
        step_lexer_fuel=100_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )
    for size, items in ((2_000, 10_000), (16_000, 100_000))
)
"""What compiling a grammar, and a mask, may take. A schema's rules are simpler than others, so it may have more."""

MAX_LARK_CHARS, MAX_GBNF_CHARS = 16_384, 8_192
"""Of a grammar, by its notation: GBNF is converted first, which takes quadratic time."""

OPTIONS = "%llguidance"
"""Begins a line of options in a Lark grammar."""


class NextTokens(NamedTuple):
    """What may follow a text.

    Args:
        bits: bit `i % 8` of byte `i // 8` says whether token `i` may.
        may_end: whether the text may end here.
    """

    bits: bytes
    may_end: bool

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        return token_id // 8 < len(self.bits) and bool(self.bits[token_id // 8] >> token_id % 8 & 1)


class Matcher:
    """Follows one text from its beginning. One thread at a time may call it.

    Args:
        end_id: the id of a token that stands for the end of the text.
    """

    def __init__(self, matcher: LLMatcher, end_id: int) -> None:
        self._matcher = matcher
        self._end_id = end_id

    def consume(self, token_ids: Sequence[int]) -> None:
        """Goes on after these tokens."""
        if token_ids:
            self._matcher.consume_tokens(list(token_ids))

    def next_tokens(self) -> NextTokens:
        """What may come next; nothing if the text does not match, or if a limit is exceeded."""
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            return NextTokens(bytes(len(bits)), may_end=False)
        place, bit = self._end_id // 8, 1 << self._end_id % 8
        may_end = bool(bits[place] & bit)
        bits[place] &= ~bit
        return NextTokens(bytes(bits), may_end)

    def along(self, drafts: Sequence[int]) -> list[NextTokens]:
        """What may come next, and what may come after each of the drafts. The text stays as it is."""
        found = [self.next_tokens()]
        num_consumed = 0
        for draft in drafts:
            if found[-1].allows(draft):
                self._matcher.consume_token(draft)
                num_consumed += 1
                found.append(self.next_tokens())
            else:
                found.append(NextTokens(b"", may_end=False))
        if num_consumed:
            self._matcher.rollback(num_consumed)
        return found


class Grammars:
    """Compiles grammars for a vocabulary.

    Args:
        tokens: the bytes of each token.
        special_ids: tokens that stand for no text.
    """

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int]) -> None:
        self._end_id = len(tokens)
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokens, special_ids)))
        self._kept = lru_cache(NUM_KEPT)(self._compile)
        self._compiling = [Lock() for _ in range(NUM_KEPT)]
        self._lock = Lock()

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequestError if it is not valid, too large, or if no text matches it."""
        self._compiled(grammar)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher of an empty text. Raises InvalidRequestError, as `check`."""
        compiled = self._compiled(grammar)
        with self._lock:
            return Matcher(compiled.deep_copy(), self._end_id)

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        """Of requests that come together with the same grammar, one compiles it."""
        with self._compiling[hash(grammar) % NUM_KEPT]:
            compiled = self._kept(grammar)
        if isinstance(compiled, str):
            message = f"structured_outputs cannot be served: {compiled:.300}"
            raise InvalidRequestError(message, "structured_outputs")
        return compiled

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        """The grammar with its first mask, whose parts all copies share; or why it is refused."""
        try:
            text = LLMatcher.grammar_from_lark(f'{_as_lark(grammar)}\n{OPTIONS} {{"no_forcing": true}}\n')
        except (ValueError, RecursionError) as error:
            return one_line(error)
        limits = JSON_LIMITS if grammar.kind in ("json", "calls") else LIMITS
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if problem := matcher.get_error() or self._first_problem(matcher):
            return _problem(problem, grammar)
        return matcher

    def _first_problem(self, matcher: LLMatcher) -> str:
        """The error in the first masks, if there is one."""
        matcher.compute_bitmask()
        probe = matcher.deep_copy()
        for _ in range(NUM_PROBED):
            mask = int.from_bytes(probe.compute_bitmask(), "little")
            first = (mask & -mask).bit_length() - 1
            if probe.is_stopped() or first == self._end_id:
                break
            probe.consume_token(first)
        return probe.get_error()


class _Vocabulary:
    """A tokenizer as llguidance wants it, with a token more for the end of a text."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int]) -> None:
        self.eos_token_id = len(tokens)
        self.tokens = [*tokens, b"<|end|>"]
        self.special_token_ids = [*special_ids, self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        raise NotImplementedError("called only where tokens are forced")


def _as_lark(grammar: Grammar) -> str:
    match grammar.kind:
        case "json":
            return f"start: %json {json.dumps(exact_schema(json.loads(grammar.text)))}"
        case "regex":
            return f"start: /{regex_to_lark(grammar.text, '')}/"
        case "choice":
            return f"start: /{regex_to_lark('|'.join(map(re.escape, json.loads(grammar.text))), '')}/"
        case "grammar":
            if OPTIONS in grammar.text:
                raise ValueError(f"{OPTIONS} is not taken")
            most = MAX_GBNF_CHARS if "::=" in grammar.text else MAX_LARK_CHARS
            if len(grammar.text) > most:
                raise ValueError(f"a grammar in this notation has at most {most} characters, got {len(grammar.text)}")
            return grammar_from("grammar", _with_exact_schemas(grammar.text))
        case "calls":
            return grammar.text


def _with_exact_schemas(text: str) -> str:
    """A grammar whose own schemas are as those that come alone."""
    first, *others = re.split(r"(?<=%json)\s*", text)
    for i, other in enumerate(others):
        try:
            schema, end = json.JSONDecoder().raw_decode(other)
        except ValueError as error:
            raise ValueError(f"what follows %json is not JSON: {error}") from None
        others[i] = f" {json.dumps(exact_schema(schema) if isinstance(schema, dict) else schema)}{other[end:]}"
    return "".join([first, *others])


def _problem(error: str, grammar: Grammar) -> str:
    """What is wrong, in a line; llguidance quotes the text around it in further lines."""
    if error.startswith("NoExtension"):
        return "no text matches it"
    first, *others = error.splitlines()
    reason = next((line.removeprefix("error: ") for line in others if line.startswith("error: ")), first)
    if grammar.kind != "grammar":  # only there the place is one that the client knows
        reason = re.sub(r"^(at )?\d+\(\d+\): ", "", reason)
    return one_line(reason.removeprefix("failed to compile JSON schema: ").partition(" Enable ")[0])
