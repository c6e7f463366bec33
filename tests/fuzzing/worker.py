"""Reads damaged checkpoints in a separate process, so that a test survives a crash, a hang or a full memory.

`python -m tests.fuzzing.worker DIRECTORY SEED FIRST COUNT` runs these cases and prints the peak resident memory in
bytes. A case depends only on the seed and its number: a COUNT of 1 runs a single case again.
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

from gptj_dist.checkpoint.index import check_checkpoint, expected_tensors, read_model_config, stored_dtypes
from gptj_dist.checkpoint.loader import TORCH_DTYPES, StageTensors
from gptj_dist.config import LayerRange
from gptj_dist.errors import CheckpointError
from gptj_dist.text.tokenizer import Tokenizer
from tests.fuzzing.models import Victim, write_models
from tests.memory import peak_bytes

CASE_LIMIT_S = 60
MAX_MESSAGE_LENGTH = 5000
MAX_NUMBERS = 1 << 20
"""Most numbers of a tensor that is read: far more than any file here holds."""

_CODECS = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "cp437", "latin-1", "raw_unicode_escape")


class Watch:
    """Reads directories, and records audit events of the reader other than listing them and opening files for reading.

    Args:
        root: parent of all directories.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._is_on = False
        self._events: list[str] = []
        sys.addaudithook(self._note)

    def read(self, directory: Path) -> None:
        """Calls `read_all` with a time limit.

        Raises:
            AssertionError: an error message is not one printable line, or the reader did something else than reading.
        """
        faulthandler.dump_traceback_later(CASE_LIMIT_S, exit=True)
        self._is_on = True
        try:
            read_all(directory)
        finally:
            self._is_on = False
            faulthandler.cancel_dump_traceback_later()
        assert not self._events, f"the reader did {self._events}"

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_listing = event in ("os.listdir", "os.scandir") and str(arguments[0]).startswith(self._root)
        if self._is_on and not is_listing and not (event == "open" and self._is_harmless(*arguments)):
            self._is_on = False  # recording an event causes events itself
            self._events.append(f"{event} {arguments!r:.200}")

    def _is_harmless(self, path: object, _mode: object, flags: int) -> bool:
        return str(path).startswith(self._root) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def read_all(directory: Path) -> None:
    """Reads a directory like a server would: the model if there is a `config.json`, else the tokenizer."""
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
        codes = stored_dtypes(config, layers, "F32")
        with StageTensors(directory, config, layers) as tensors:
            for name, shape in expected_tensors(config, layers).items():
                assert torch.Size(shape).numel() < MAX_NUMBERS, f"{name} of {shape} comes of a tiny file"
                tensors.read(name, torch.empty(shape, dtype=TORCH_DTYPES[codes.get(name, "F32")]))


def _use_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    tokenizer.decode(tokenizer.encode("abc ab é"))
    tokenizer.spare_ids(50)


def run_case(victims: list[Victim], watch: Watch, seed: int, case: int) -> None:
    """Damages a file, reads its checkpoint, and restores the file."""
    random = Random(f"{seed}/{case}")
    victim = random.choices(victims, [victim.weight for victim in victims])[0]
    victim.path.write_bytes(victim.spoil(random))
    try:
        watch.read(victim.path.parent)
    except BaseException as error:  # a panic of a Rust library is not an Exception
        error.add_note(f"seed {seed}, case {case}, {victim.path.parent.name}/{victim.path.name}")
        raise
    victim.path.write_bytes(victim.good)


def prepare(root: Path) -> tuple[list[Victim], Watch]:
    """Writes the model in all forms, and reads it once, so that later reads import nothing."""
    logging.disable()  # a logger inspects its caller's frame, which the watch would record
    victims = write_models(root)
    for codec in _CODECS:
        codecs.lookup(codec)
    for victim in victims:
        read_all(victim.path.parent)
    return victims, Watch(root)


def main() -> None:
    root, (seed, first, count) = Path(sys.argv[1]), map(int, sys.argv[2:])
    victims, watch = prepare(root)
    for case in range(first, first + count):
        (root / "case").write_text(f"seed {seed}, case {case}")  # names the case if the process dies
        run_case(victims, watch, seed, case)
    print(peak_bytes())


if __name__ == "__main__":
    main()
