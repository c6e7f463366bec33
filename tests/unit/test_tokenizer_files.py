"""Tokenizer files mean what they mean in transformers, which is the oracle here."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Tokenizer

import gptj_dist
from gptj_dist.errors import CheckpointError
from gptj_dist.text.chat import load_chat_template
from gptj_dist.text.detokenizer import Detokenizer
from gptj_dist.text.tokenizer import Tokenizer

GPT2_FILES = Path(gptj_dist.__file__).parent / "text" / "gpt2_bpe"
END = "<|endoftext|>"

Files = Mapping[str, Any]


def flags(content: str, **given: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    return {"content": content, **usual, **given}


MODERN = {
    "50256": flags(END, special=True),
    "50257": flags("[PAD]", special=True),
    "50258": flags("### End", special=True),
    "50259": flags("<sep>", lstrip=True),
    "50260": flags("<right>", rstrip=True, normalized=True),
    "50261": flags("zzqx", single_word=True),
    "50262": flags("ñandú"),
}

CASES: dict[str, Files] = {
    "nothing": {},
    "specials and strips": {
        "tokenizer_config.json": {"added_tokens_decoder": MODERN, "pad_token": "[PAD]", "eos_token": "### End"}
    },
    "specials named only by the configuration": {
        "tokenizer_config.json": {"pad_token": "[PAD]", "additional_special_tokens": ["<a>", "<b>"], "sep_token": "<s>"}
    },
    "special tokens as objects": {
        "tokenizer_config.json": {
            "pad_token": {"__type": "AddedToken", **flags("<sep>", lstrip=True, rstrip=True)},
            "bos_token": {"__type": "AddedToken", **flags(END, normalized=True)},
        }
    },
    "a token that only the configuration makes special": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"50257": flags("[PAD]"), "50258": flags("<a>")},
            "pad_token": "[PAD]",
            "extra_special_tokens": ["<a>"],
        }
    },
    "names of its own": {"tokenizer_config.json": {"user_token": "<user>", "extra_special_tokens": {"x": "<x>"}}},
    "end of text is not special": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"50257": flags("<s>", special=True)},
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<s>"),
        }
    },
    "prefix space": {"tokenizer_config.json": {"add_prefix_space": True, "added_tokens_decoder": MODERN}},
    "begins with bos": {"tokenizer_config.json": {"add_bos_token": True}},
    "begins with bos of its own, ends with eos": {
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": True,
            "added_tokens_decoder": MODERN,
            "bos_token": "[PAD]",
        }
    },
    "names are text": {"tokenizer_config.json": {"split_special_tokens": True, "added_tokens_decoder": MODERN}},
    "older files": {
        "tokenizer_config.json": {"pad_token": "[OLD]"},
        "special_tokens_map.json": {
            "eos_token": flags("### End", lstrip=True),
            "pad_token": "[PAD]",
        },
        "added_tokens.json": {"### End": 50258, "[PAD]": 50257, "<sep>": 50259, "<user>": 50260, "two words": 50261},
    },
    "gptj": {"added_tokens.json": {f"<|extratoken_{i}|>": 50256 + i for i in range(1, 144)}},
}

TEXTS = [
    "",
    " ",
    "Hello world",
    " Hello  world ",
    "x  <sep>  y<sep>z",
    "a  <right>  b <right>",
    "### End",
    "one ### End two  ### End",
    "[PAD][PAD] x [PAD]",
    "azzqx zzqx zzqxs zzqx. szzqx zzqx",
    "unñandú ñandú",
    f"one{END}two {END}  ",
    "<a> <b><s> <user> <x>  <user>",
    "two words, twotwo words",
    "<|extratoken_1|> <|extratoken_143|><|extratoken_144|>",
    "日本語 👩‍👧 Ελληνικά\t\n\r\n",
]


def write(directory: Path, files: Files) -> Path:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GPT2_FILES / name, directory)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, GPT2Tokenizer]:
    directory = write(tmp_path_factory.mktemp("tokenizer"), CASES[request.param])
    return Tokenizer.load(directory), GPT2Tokenizer.from_pretrained(directory)


def random_texts() -> list[str]:
    rng = random.Random(4)
    parts = [
        "<sep>",
        "<right>",
        "zzqx",
        "ñandú",
        "[PAD]",
        "### End",
        END,
        "<a>",
        "<s>",
        " ",
        "  ",
        "x",
        "\n",
        ".",
        "Hello",
    ]
    return ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(200)]


@pytest.mark.parametrize("adds", [False, True])
def test_texts_are_encoded_as_transformers_does(pair: tuple[Tokenizer, GPT2Tokenizer], adds: bool) -> None:
    ours, theirs = pair
    for text in [*TEXTS, *random_texts()]:
        assert ours.encode(text, add_special_tokens=adds) == theirs.encode(text, add_special_tokens=adds), text


def test_ids_are_decoded_as_transformers_does_with_special_tokens_and_without(
    pair: tuple[Tokenizer, GPT2Tokenizer],
) -> None:
    ours, theirs = pair
    rng = random.Random(5)
    for _ in range(300):
        ids = [rng.randrange(*rng.choice([(0, 50256), (50256, 50264)])) for _ in range(rng.randint(0, 9))]
        for skips in (False, True):
            detokenizer = Detokenizer(ours, skips)
            assert detokenizer.push(ids) + detokenizer.finish() == theirs.decode(ids, skip_special_tokens=skips), ids


def test_an_added_token_keeps_the_id_that_its_file_gives_it(tmp_path: Path) -> None:
    listed = {"50300": flags("<far>", special=True), "50290": flags("<near>")}
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer_config.json": {"added_tokens_decoder": listed}}))

    assert tokenizer.encode("<far> <near>") == [50300, 220, 50290]
    assert tokenizer.token_bytes(50300) == b""
    assert tokenizer.token_bytes(50290) == b"<near>"
    assert 50290 not in tokenizer.spare_ids(50400)
    assert 50289 in tokenizer.spare_ids(50400)


@pytest.mark.parametrize("token", ["Hello", END])
def test_an_added_token_with_the_id_of_another_is_refused(tmp_path: Path, token: str) -> None:
    listed = {"7": flags(token)}
    with pytest.raises(CheckpointError, match="cannot have id 7"):
        Tokenizer.load(write(tmp_path, {"tokenizer_config.json": {"added_tokens_decoder": listed}}))


def test_the_configuration_marks_tokens_of_a_whole_tokenizer_as_special(tmp_path: Path) -> None:
    write(tmp_path, CASES["specials and strips"])
    GPT2Tokenizer.from_pretrained(tmp_path).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in whole["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))

    ours, theirs = Tokenizer.load(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)

    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_additional_special_tokens_of_older_files_are_special(tmp_path: Path) -> None:
    """As in transformers 4, which wrote such files."""
    files = {"special_tokens_map.json": {"additional_special_tokens": ["<a>"]}, "added_tokens.json": {"<a>": 50257}}
    tokenizer = Tokenizer.load(write(tmp_path, files))

    assert tokenizer.encode("x<a>") == [87, 50257]
    assert tokenizer.decode([87, 50257]) == "x"


@pytest.mark.parametrize("value", [True, 7, "<a>"])
def test_more_special_tokens_that_are_no_list_are_none(tmp_path: Path, value: object) -> None:
    assert Tokenizer.load(write(tmp_path, {"tokenizer_config.json": {"extra_special_tokens": value}})).num_entries > 0


def test_texts_end_with_an_eos_token_that_holds_a_space(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": {"added_tokens_decoder": MODERN, "eos_token": "### End", "add_eos_token": True}}
    assert Tokenizer.load(write(tmp_path, files)).encode("x", add_special_tokens=True) == [87, 50258]


def test_a_whole_tokenizer_adds_the_tokens_that_it_was_saved_with(tmp_path: Path) -> None:
    write(tmp_path, CASES["begins with bos"])
    GPT2Tokenizer.from_pretrained(tmp_path).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))

    tokenizer = Tokenizer.load(tmp_path)

    assert tokenizer.encode("a", add_special_tokens=True) == [50256, 64]
    assert tokenizer.encode("a") == [64]
    assert tokenizer.encode_prompt("a", [50256]) == [50256, 64]
    assert tokenizer.encode_prompt([64], [50256]) == [64]


def test_a_template_knows_the_special_tokens_that_transformers_knows(tmp_path: Path) -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ user_token }}"
    for files in ({}, CASES["older files"], {"tokenizer_config.json": {"user_token": "<user>"}}):
        theirs = GPT2Tokenizer.from_pretrained(write(tmp_path, files))
        template = load_chat_template(tmp_path, source)
        assert template is not None
        messages = [{"role": "user", "content": "x"}]
        expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
        assert template.render(messages, {}, begins_answer=False) == expected
