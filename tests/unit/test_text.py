"""Text in and out: encoding as transformers does, decoding token by token, stop strings over any cut of the text."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
from transformers import GPT2TokenizerFast

import gptj_dist
from gptj_dist.errors import CheckpointError
from gptj_dist.text.detokenizer import Detokenizer
from gptj_dist.text.stop_strings import StopPattern, StopStrings, prepare_stops
from gptj_dist.text.tokenizer import Tokenizer

GPT2_FILES = Path(gptj_dist.__file__).parent / "text" / "gpt2_bpe"
DEMO = Path(gptj_dist.__file__).parent / "demo"
GPTJ_VOCAB_SIZE = 50400

TEXTS = [
    "The quick brown fox, as they say, didn't jump.",
    "  two spaces,\ttab\n\n\nnewlines \r\n and trailing   ",
    "emoji 👩\u200d👩\u200d👧\u200d👦 and 🏳\ufe0f\u200d🌈, flags 🇫🇷🇯🇵, skin 👍🏽",
    "日本語のテキスト、中文字符。한국어",
    "combining: e\u0301 n\u0303 Z\u0351\u036b\u0343; Ελληνικά; עברית; ไทย",
    "math \U0001d518\U0001d52b \u2028 \x00\x7f\xad\xa0",
    "one<|endoftext|>two <|endoftext|>",
    "",
]


@pytest.fixture(scope="module")
def gptj(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """GPT-J's own tokenizer: GPT-2's vocabulary, and names for the 143 rows that pad the embedding."""
    directory = tmp_path_factory.mktemp("gptj")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GPT2_FILES / name, directory)
    padding = {f"<|extratoken_{i}|>": 50256 + i for i in range(1, 144)}
    (directory / "added_tokens.json").write_text(json.dumps(padding))
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.load(DEMO)


@pytest.fixture(params=["gptj", "demo"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    loaded: Tokenizer = request.getfixturevalue(request.param)
    return loaded


def random_ends(length: int, rng: random.Random) -> list[tuple[int, int]]:
    """A cut of `length` items into pieces, some of them empty, as (start, end) pairs."""
    ends = sorted(rng.randint(0, length) for _ in range(rng.randint(0, length + 2)))
    return list(zip([0, *ends], [*ends, length], strict=True))


def pushed(tokenizer: Tokenizer, ids: list[int], cut: list[tuple[int, int]]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([detokenizer.push(ids[start:end]) for start, end in cut]) + detokenizer.finish()


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_encodes_as_transformers_does(self, gptj: Tokenizer, text: str) -> None:
        oracle = GPT2TokenizerFast.from_pretrained(GPT2_FILES)
        assert gptj.encode(text) == oracle.encode(text, add_special_tokens=False)

    @pytest.mark.parametrize("text", TEXTS)
    def test_decodes_what_it_encoded_less_special_tokens(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|endoftext|>", "")

    def test_decodes_any_ids_as_the_tokenizers_library_does(self, demo: Tokenizer) -> None:
        rng = random.Random(1)
        library = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        for _ in range(300):
            ids = [rng.randrange(4128) for _ in range(rng.randint(0, 12))]
            assert demo.decode(ids) == library.decode(ids, skip_special_tokens=True)

    def test_knows_the_bytes_of_every_token(self, gptj: Tokenizer) -> None:
        assert {gptj.token_bytes(id) for id in range(256)} == {bytes([byte]) for byte in range(256)}
        assert gptj.token_bytes(gptj.encode(" hello")[0]) == b" hello"
        assert gptj.token_bytes(50257) == b"<|extratoken_1|>"

    @pytest.mark.parametrize("id", [50256, 50400, -1])
    def test_special_tokens_and_unknown_ids_have_no_bytes(self, gptj: Tokenizer, id: int) -> None:
        assert gptj.token_bytes(id) == b""

    def test_added_tokens_outside_the_byte_alphabet_are_plain_text(self, tmp_path: Path) -> None:
        bpe = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        bpe.add_tokens(["two words"])
        bpe.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.decode(tokenizer.encode("a two words")) == "a two words"

    def test_padding_rows_are_never_sampled(self, gptj: Tokenizer, demo: Tokenizer) -> None:
        assert gptj.num_entries == GPTJ_VOCAB_SIZE
        assert gptj.spare_ids(GPTJ_VOCAB_SIZE) == list(range(50257, 50400))
        assert gptj.spare_ids(50257) == []
        assert demo.spare_ids(4128) == list(range(demo.num_entries, 4128))

    def test_rows_without_a_name_are_never_sampled(self) -> None:
        assert Tokenizer.load(GPT2_FILES).spare_ids(GPTJ_VOCAB_SIZE) == list(range(50257, 50400))

    def test_a_file_that_truncates_and_pads_does_not_cut_prompts(self, tmp_path: Path, demo: Tokenizer) -> None:
        bpe = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        bpe.enable_truncation(4)
        bpe.enable_padding(length=64)
        bpe.save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == demo.encode(TEXTS[0])

    @pytest.mark.parametrize(
        ("files", "named"),
        [
            ({}, "vocab.json"),
            ({"vocab.json": "{}"}, "merges.txt"),
            ({"vocab.json": "{", "merges.txt": "#version: 0.2"}, "vocab.json"),
            ({"vocab.json": '{"a": 0}', "merges.txt": "a b c d\n"}, "merges.txt"),
            ({"tokenizer.json": '{"model":\n1}'}, "tokenizer.json"),
            ({"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}'}, "byte-level"),
            (
                {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2", "added_tokens.json": "[1]"},
                "added_tokens.json",
            ),
            (
                {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2", "added_tokens.json": '{"b": "1"}'},
                "'b' has id '1'",
            ),
            (
                {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2", "added_tokens.json": '{"b": 0}'},
                "'b' cannot have id 0",
            ),
            (
                {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2", "added_tokens.json": '{"b": 1, "c": 1}'},
                "'c' has id 1",
            ),
            (
                {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2", "tokenizer_config.json": "[]"},
                "tokenizer_config.json",
            ),
            (
                {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2", "special_tokens_map.json": "{"},
                "special_tokens_map.json",
            ),
            (
                {
                    "vocab.json": '{"a": 0}',
                    "merges.txt": "#version: 0.2",
                    "tokenizer_config.json": '{"added_tokens_decoder": {"1": {"special": true}}}',
                },
                "has id 1, which is no free id of a token",
            ),
        ],
    )
    def test_missing_or_broken_files_are_named_in_one_line(
        self, tmp_path: Path, files: dict[str, str], named: str
    ) -> None:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError) as raised:
            Tokenizer.load(tmp_path)
        assert named in str(raised.value)
        assert str(tmp_path) in str(raised.value)
        assert "\n" not in str(raised.value)


class TestDetokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_no_split_of_the_ids_changes_the_text(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        for split in range(len(ids) + 1):
            assert pushed(tokenizer, ids, [(0, split), (split, len(ids))]) == tokenizer.decode(ids)
        assert pushed(tokenizer, ids, [(i, i + 1) for i in range(len(ids))]) == tokenizer.decode(ids)

    @pytest.mark.parametrize("text", TEXTS)
    def test_text_so_far_is_always_a_prefix_without_half_characters(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        detokenizer, so_far = Detokenizer(tokenizer), ""
        for id in ids:
            so_far += detokenizer.push([id])
            assert tokenizer.decode(ids).startswith(so_far)

    def test_a_character_is_released_by_the_token_that_completes_it(self, gptj: Tokenizer) -> None:
        ids = gptj.encode("👩")
        assert len(ids) > 1
        detokenizer = Detokenizer(gptj)
        assert [detokenizer.push([id]) for id in ids] == [""] * (len(ids) - 1) + ["👩"]

    def test_random_ids_decode_alike_whole_and_in_pieces(self, tokenizer: Tokenizer) -> None:
        rng = random.Random(2)
        for _ in range(300):
            # Half of the ids are single bytes, so that most sequences are not UTF-8.
            ids = [rng.randrange(rng.choice([257, GPTJ_VOCAB_SIZE + 9])) for _ in range(rng.randint(0, 16))]
            data = b"".join(map(tokenizer.token_bytes, ids))
            text = pushed(tokenizer, ids, random_ends(len(ids), rng))
            assert text == tokenizer.decode(ids) == data.decode("utf-8", "replace")

    def test_an_output_that_ends_within_a_character_ends_with_a_replacement(self, gptj: Tokenizer) -> None:
        detokenizer = Detokenizer(gptj)
        assert detokenizer.push(gptj.encode("x👩")[:-1]) == "x"
        assert detokenizer.finish() == "\ufffd"


def fibonacci(length: int) -> str:
    """The string whose mismatches fall through most states (Knuth, Morris, Pratt 1977, section 2)."""
    one, other = "a", "ab"
    while len(other) < length:
        one, other = other, other + one
    return other[:length]


def by_the_rule(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


def held_by_the_rule(text: str, stops: list[str]) -> int:
    prefixes = [stop[:length] for stop in stops for length in range(len(stop))]
    return max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)


class TestStopStrings:
    @pytest.mark.parametrize(
        ("stops", "text", "expected"),
        [
            ([], "anything", ("anything", False)),
            (["END"], "the END of", ("the ", True)),
            (["END"], "the EN", ("the EN", False)),
            (["b", "abc"], "xabc", ("xa", True)),
            (["c", "abc"], "xabc", ("x", True)),
            (["abc", "bc"], "xabc", ("x", True)),
            (["abcd", "bc"], "xabcd", ("xa", True)),
            (["aab"], "aaab", ("a", True)),
            (["abab", "abac"], "ababab", ("", True)),
            (["\n\n"], "a\n\n\nb", ("a", True)),
            (["👩\u200d👧"], "x👩\u200d👧y", ("x", True)),
        ],
    )
    def test_the_match_complete_first_ends_the_text(
        self, stops: list[str], text: str, expected: tuple[str, bool]
    ) -> None:
        for pieces in ([text], list(text)):
            watch = StopStrings(prepare_stops(stops))
            results = [watch.push(piece) for piece in pieces]
            released = "".join(text for text, _ in results) + watch.finish()
            assert (released, results[-1][1]) == expected

    def test_no_cut_of_the_text_changes_the_result_and_nothing_is_held_needlessly(self) -> None:
        rng = random.Random(3)
        for _ in range(2000):
            text = "".join(rng.choices("aab", k=rng.randint(0, 24)))
            stops = ["".join(rng.choices("aab", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 4))]
            watch, released, is_stopped = StopStrings(prepare_stops(stops)), "", False
            for start, end in random_ends(len(text), rng):
                piece, is_stopped = watch.push(text[start:end])
                released += piece
                if not is_stopped:
                    assert len(text[:end]) - len(released) == held_by_the_rule(text[:end], stops)
            assert (released + watch.finish(), is_stopped) == by_the_rule(text, stops), (text, stops)

    def test_what_follows_a_stop_string_is_dropped(self) -> None:
        watch = StopStrings(prepare_stops(["."]))
        assert watch.push("one. two") == ("one", True)
        assert watch.push(" three") == ("", True)
        assert watch.finish() == ""

    def test_hidden_pieces_count_and_do_not_count(self) -> None:
        """Whatever a reader could hold for the text, with the hidden pieces or without, holds no stop string."""
        rng = random.Random(7)
        for _ in range(4000):
            pieces = [
                ("".join(rng.choices("aab", k=rng.randint(0, 3))), rng.random() < 0.6) for _ in range(rng.randint(0, 9))
            ]
            stops = ["".join(rng.choices("aab", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
            for keeps in (False, True):
                watch, released, is_stopped = StopStrings(prepare_stops(stops), keeps), "", False
                for piece, is_shown in pieces:
                    text, is_stopped = watch.push(piece, is_shown)
                    released += text
                expected = hidden_by_the_rule(pieces, stops, keeps)
                assert (released + watch.finish(), is_stopped) == expected, (pieces, stops, keeps)

    @pytest.mark.parametrize(
        ("keeps", "expected"),
        [(False, ["one ", "one ", "one "]), (True, ["one ### End", "one two", "one two ### End"])],
    )
    def test_a_hidden_name_completes_a_stop_string(self, keeps: bool, expected: list[str]) -> None:
        hidden = ("### End", False)
        texts = [
            [("one ", True), hidden],
            [("one tw", True), hidden, ("o", True)],
            [("one two ", True), hidden],
        ]
        for stop, pieces, text in zip(["### End", "two", "two ### End"], texts, expected, strict=True):
            watch = StopStrings(prepare_stops([stop]), keeps)
            results = [watch.push(*piece) for piece in pieces]
            assert ("".join(text for text, _ in results), results[-1][1]) == (text, True)

    def test_stop_strings_that_nearly_match_cost_a_step_a_character(self) -> None:
        watch = StopStrings(prepare_stops(["a" * 2000 + "b"] * 16))
        for _ in range(900):
            assert watch.push("aaaa")[1] is False
        assert len(watch.finish()) == 2000

    @pytest.mark.parametrize("stop", ["a" * 4000 + "b", "ab" * 2000 + "c", ("a" * 60 + "b") * 60, fibonacci(4000)])
    def test_no_character_costs_many_steps(self, stop: str) -> None:
        """The most that a mismatch may fall through; each step is one of them."""
        after = StopPattern(stop).after_mismatch
        num_steps = [0] * len(after)
        for number, next_ in enumerate(after):
            num_steps[number] = 1 + (num_steps[next_] if next_ >= 0 else 0)
        assert max(num_steps) <= 1.5 * math.log2(len(stop)) + 2


def hidden_by_the_rule(pieces: list[tuple[str, bool]], stops: list[str], keeps: bool) -> tuple[str, bool]:
    """By looking at ever longer beginnings of both texts."""
    chars = [(char, is_shown) for piece, is_shown in pieces for char in piece]
    for end in range(1, len(chars) + 1):
        found = []
        for counts_hidden in (True, False):
            places = [i for i in range(end) if counts_hidden or chars[i][1]]
            text = "".join(chars[i][0] for i in places)
            if places and places[-1] == end - 1:
                found += [(places[-len(stop)], counts_hidden, stop) for stop in stops if text.endswith(stop)]
        if found:
            begin, _, stop = min(found)
            head = "".join(char for char, is_shown in chars[:begin] if is_shown)
            return head + (stop if keeps else ""), True
    return "".join(char for char, is_shown in chars if is_shown), False
