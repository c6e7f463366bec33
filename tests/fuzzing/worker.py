"""Reads damaged checkpoints in a process of its own, so that a crash, a hang or a full memory is the test's to see.

`python -m tests.fuzzing.worker DIRECTORY SEED FIRST COUNT` runs these cases and prints the largest resident memory in
bytes. A case depends on nothing but the seed and its number: run one with a COUNT of 1 to see what it does.
"""

from __future__ import annotations

import codecs
import faulthandler
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from gptj_dist.checkpoint.index import check_checkpoint, expected_tensors, read_model_config
from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.config import LayerRange
from gptj_dist.errors import CheckpointError
from gptj_dist.text.tokenizer import Tokenizer
from tests.fuzzing.models import Victim, write_models
from tests.memory import peak_bytes

CASE_LIMIT_S = 60
MAX_MESSAGE_LENGTH = 5000
MAX_NUMBERS = 1 << 20
"""Of a tensor in a case that can be read: far more than any file here holds."""

_CODECS = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "cp437", "latin-1", "raw_unicode_escape")


class Watch:
    """Reads a directory, and notes whatever the reader does but to open files in it for reading.

    Args:
        root: of all directories.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._is_on = False
        self._events: list[str] = []
        sys.addaudithook(self._note)

    def read(self, directory: Path) -> None:
        """Reads a directory as `read_all` does, against the clock.

        Raises:
            AssertionError: something but a CheckpointError of one line comes of it, or the reader did something else.
        """
        faulthandler.dump_traceback_later(CASE_LIMIT_S, exit=True)
        self._is_on = True
        try:
            read_all(directory)
        finally:
            self._is_on = False
            faulthandler.cancel_dump_traceback_later()
        assert not self._events, f"it did {self._events}"

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_on and not (event == "open" and self._is_harmless(*arguments)):
            self._is_on = False  # making the note is no event
            self._events.append(f"{event} {arguments!r:.200}")

    def _is_harmless(self, path: object, _mode: object, flags: int) -> bool:
        return str(path).startswith(self._root) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def read_all(directory: Path) -> None:
    """Reads whatever is in a directory as serving it would: tokenizer files, or else a model."""
    if not (directory / "config.json").exists():
        return _expect_refusal(lambda: _use_tokenizer(directory))
    _expect_refusal(lambda: check_checkpoint(directory, read_model_config(directory)))
    return _expect_refusal(lambda: _read_stages(directory))


def _expect_refusal(read: Callable[[], None]) -> None:
    try:
        read()
    except CheckpointError as error:
        text = str(error)
        assert text.isprintable(), f"not one printable line: {text[:500]!r}"
        assert len(text) < MAX_MESSAGE_LENGTH, f"{len(text)} characters: {text[:500]}"


def _read_stages(directory: Path) -> None:
    config = read_model_config(directory)
    cut = config.num_layers // 2
    stages = [LayerRange(0, 2, 0, cut), LayerRange(1, 2, cut, config.num_layers)]
    for layers in stages:
        with StageTensors(directory, config, layers) as tensors:
            for name, shape in expected_tensors(config, layers).items():
                assert torch.Size(shape).numel() < MAX_NUMBERS, f"{name} of {shape} comes of a tiny file"
                tensors.read(name, torch.empty(shape))


def _use_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    tokenizer.decode(tokenizer.encode("abc ab é"))
    tokenizer.spare_ids(50)


def run_case(victims: list[Victim], watch: Watch, seed: int, case: int) -> None:
    """Damages a file, reads its checkpoint, mends the file."""
    random = Random(f"{seed}/{case}")
    victim = random.choices(victims, [victim.weight for victim in victims])[0]
    victim.path.write_bytes(victim.spoil(random))
    try:
        watch.read(victim.path.parent)
    except BaseException as error:  # a panic of a Rust library is no Exception
        error.add_note(f"seed {seed}, case {case}, {victim.path.parent.name}/{victim.path.name}")
        raise
    victim.path.write_bytes(victim.good)


def prepare(root: Path) -> tuple[list[Victim], Watch]:
    """Writes the model in all forms, and reads it once, so that nothing is imported any more."""
    logging.disable()  # a logger looks at its caller's frame, which the watch would note
    victims = write_models(root)
    for codec in _CODECS:
        codecs.lookup(codec)
    for victim in victims:
        read_all(victim.path.parent)
    return victims, Watch(root)


def main() -> None:
    """Entry point."""
    root, (seed, first, count) = Path(sys.argv[1]), map(int, sys.argv[2:])
    victims, watch = prepare(root)
    for case in range(first, first + count):
        (root / "case").write_text(f"seed {seed}, case {case}")  # in case that the process dies of it
        run_case(victims, watch, seed, case)
    print(peak_bytes())


if __name__ == "__main__":
    main()
