"""Log probabilities as they are written: offsets into the text that is returned, names that mean one token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import gptj_dist
from gptj_dist.answers.completion import TextDelta
from gptj_dist.answers.schema.base import parse_body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.writers import ChatWriter, CompletionWriter
from gptj_dist.engine.request import FinishReason
from gptj_dist.params import TokenLogprobs
from gptj_dist.text.output import TextOutput
from gptj_dist.text.stop_strings import prepare_stops
from gptj_dist.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(gptj_dist.__file__).parent / "demo")
[EOS] = TOKENIZER.encode("<|endoftext|>")


def deltas_of(
    ids: Sequence[int], stop: str = "", top: Sequence[tuple[int, float]] = (), skips_special: bool = True
) -> Iterator[TextDelta]:
    """What a completion of these tokens is, one token at a time."""
    output = TextOutput(TOKENIZER, prepare_stops([stop] if stop else []), 0, skips_special=skips_special)
    for number, token_id in enumerate(ids, start=1):
        text, is_stopped = output.push([token_id], number == len(ids))
        reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH if number == len(ids) else None
        yield TextDelta(text, (token_id,), reason, (TokenLogprobs(token_id, -1.0, 3, tuple(top)),))


def whole(deltas: Sequence[TextDelta]) -> TextDelta:
    ids = tuple(id for delta in deltas for id in delta.token_ids)
    logprobs = tuple(token for delta in deltas for token in delta.logprobs)
    return TextDelta("".join(delta.text for delta in deltas), ids, deltas[-1].finish_reason, logprobs)


def completion(delta: TextDelta, prompt: str = "", **fields: Any) -> dict[str, Any]:
    """A choice."""
    request = parse_body(json.dumps({"prompt": "x", "logprobs": 1, **fields}).encode(), CompletionRequest)
    prompt_ids = TOKENIZER.encode(prompt)
    if request.echo:
        known = tuple(TokenLogprobs(id, -1.0, 3, ()) for id in prompt_ids[1:])
        delta = TextDelta(delta.text, delta.token_ids, delta.finish_reason, delta.logprobs, known)
    return CompletionWriter(0, request, prompt, prompt_ids, TOKENIZER).whole(delta)


def token_of(raw: bytes) -> int:
    return next(id for id in range(TOKENIZER.num_entries) if TOKENIZER.token_bytes(id) == raw)


TEXTS = ["plain words", "a 😀 b", "😀😀", "é€🌈 x", "naïve 中文 text", "x😀", "\u0000\u2028y"]


class TestOffsets:
    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("prompt", ["", "I ", "I 😀 b", "中", "<|endoftext|>x"])
    def test_an_offset_is_where_the_tokens_character_begins_in_the_text(self, prompt: str, text: str) -> None:
        choice = completion(whole(list(deltas_of(TOKENIZER.encode(text)))), prompt, echo=True)
        ids = TOKENIZER.encode(prompt) + TOKENIZER.encode(text)
        assert choice["text"] == prompt + text
        expected, num_bytes = [], 0
        starts = [0]
        for char in prompt + text:
            starts.append(starts[-1] + len(char.encode()))
        for id in ids:
            expected.append(max(number for number, start in enumerate(starts) if start <= num_bytes))
            num_bytes += len(TOKENIZER.token_or_special_bytes(id))
        assert choice["logprobs"]["text_offset"] == expected

    @pytest.mark.parametrize("text", TEXTS)
    def test_the_offsets_of_a_stream_are_those_of_the_whole(self, text: str) -> None:
        deltas = list(deltas_of([*TOKENIZER.encode(text), EOS, *TOKENIZER.encode(text)]))
        request = parse_body(b'{"prompt": "x", "logprobs": 1}', CompletionRequest)
        writer = CompletionWriter(0, request, "x", [5], TOKENIZER)
        pieces = [piece for delta in deltas if (piece := writer.piece(delta)) is not None]
        offsets = [offset for piece in pieces for offset in piece["logprobs"]["text_offset"]]
        assert offsets == completion(whole(deltas))["logprobs"]["text_offset"]

    def test_a_special_token_counts_only_where_the_text_shows_it(self) -> None:
        ids = [*TOKENIZER.encode("ab"), EOS, *TOKENIZER.encode("cd")]
        for skips, length in ((True, 0), (False, len("<|endoftext|>"))):
            deltas = list(deltas_of(ids, skips_special=skips))
            choice = completion(whole(deltas), skip_special_tokens=skips)
            after = choice["logprobs"]["text_offset"][len(TOKENIZER.encode("ab")) + 1]
            assert after == 2 + length
            assert choice["text"][after:] == "cd"

    def test_no_offset_is_beyond_the_text_that_a_stop_string_has_cut(self) -> None:
        for stop in ("cd", "d", " cd e", "ab"):
            deltas = list(deltas_of(TOKENIZER.encode("ab cd e"), stop))
            deltas = deltas[: 1 + [delta.finish_reason for delta in deltas].index(FinishReason.STOP)]
            choice = completion(whole(deltas))
            assert max(choice["logprobs"]["text_offset"]) <= len(choice["text"])

    def test_an_empty_prompt_that_stands_for_end_of_text_has_no_characters(self) -> None:
        request = parse_body(b'{"prompt": "", "logprobs": 1, "echo": true}', CompletionRequest)
        delta = whole(list(deltas_of(TOKENIZER.encode("ab cd"))))
        choice = CompletionWriter(0, request, "", [EOS], TOKENIZER).whole(delta)
        assert choice["text"] == "ab cd"
        assert choice["logprobs"]["text_offset"][:2] == [0, 0]


class TestNames:
    PIECES = ((token_of(b"\xf0"), -0.5), (token_of(b"\x9f"), -1.5), (token_of(b"\x98"), -2.5), (token_of(b"a"), -3.5))

    def test_each_token_speaks_for_itself(self) -> None:
        [delta] = deltas_of([token_of(b"\x80")], top=self.PIECES)
        [top] = completion(delta, logprobs=4)["logprobs"]["top_logprobs"]
        assert top == {"bytes:\\xf0": -0.5, "bytes:\\x9f": -1.5, "bytes:\\x98": -2.5, "a": -3.5, "bytes:\\x80": -1.0}

    def test_tokens_have_the_same_names_in_every_list(self) -> None:
        [delta] = deltas_of([token_of(b"\x9f")], top=self.PIECES)
        logprobs = completion(delta, logprobs=4)["logprobs"]
        assert logprobs["tokens"] == ["bytes:\\x9f"]
        assert logprobs["top_logprobs"][0][logprobs["tokens"][0]] == -1.0
        request = parse_body(
            b'{"messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 4}', ChatRequest
        )
        [entry] = ChatWriter(0, request, [5], TOKENIZER).whole(delta)["logprobs"]["content"]
        assert [one["token"] for one in (entry, *entry["top_logprobs"])] == [
            "bytes:\\x9f", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "a"
        ]  # fmt: skip
        assert entry["bytes"] == [0x9F]

    def test_of_tokens_with_the_same_text_the_sampled_one_has_the_name_and_others_their_ids(self) -> None:
        nameless = [(TOKENIZER.num_entries + i, -float(i)) for i in range(1, 4)]
        assert {TOKENIZER.token_text(id) for id, _ in nameless} == {""}
        [delta] = deltas_of([nameless[1][0]], top=nameless)
        [top] = completion(delta, logprobs=3)["logprobs"]["top_logprobs"]
        first, _, third = (id for id, _ in nameless)
        assert top == {f"token_id:{first}": -1.0, "": -1.0, f"token_id:{third}": -3.0}

    def test_tokens_are_named_by_their_ids_if_wanted(self) -> None:
        [delta] = deltas_of([token_of(b"\x9f")], top=self.PIECES)
        logprobs = completion(delta, logprobs=4, return_tokens_as_token_ids=True)["logprobs"]
        assert logprobs["tokens"] == [f"token_id:{token_of(bytes([0x9F]))}"]
        assert set(logprobs["top_logprobs"][0]) == {f"token_id:{id}" for id, _ in self.PIECES}
