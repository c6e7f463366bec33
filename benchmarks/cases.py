"""The cases of benchmarks: how many prompts of which length at once, and how many tokens out. Stdlib only.

Written `8x128/64`: 8 requests at once, 128 tokens in, 64 out. `1x1024/1` is one long prompt and its first token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NUM_TOKEN_IDS = 4000
"""Prompts are random ids below this. Every vocabulary has these ids, the demo model's too."""


@dataclass(frozen=True, slots=True)
class Case:
    """One load.

    Args:
        batch: requests at once.
        input_len, output_len: tokens of each.
    """

    batch: int
    input_len: int
    output_len: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.input_len}/{self.output_len}"

    @property
    def num_input_tokens(self) -> int:
        return self.batch * self.input_len

    def prompts(self, seed: int) -> list[list[int]]:
        """Random token ids [batch][input_len]; the same for the same seed."""
        rng = random.Random(seed)
        return [rng.choices(range(NUM_TOKEN_IDS), k=self.input_len) for _ in range(self.batch)]

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def parse_case(text: str) -> Case:
    """Parses `8x128/64`. Raises ValueError on anything else."""
    match = re.fullmatch(r"(\d+)x(\d+)/(\d+)", text)
    if match is None or "0" in match.groups():
        raise ValueError(f"{text!r} is not BATCHxINPUT/OUTPUT, such as 8x128/64")
    return Case(*map(int, match.groups()))


def case_of(fields: Mapping[str, Any]) -> Case:
    """The inverse of `as_json`; ignores other fields."""
    return Case(fields["batch"], fields["input_len"], fields["output_len"])
