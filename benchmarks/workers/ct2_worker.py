"""CTranslate2's engine, run by the interpreter of its own environment. Does not import `gptj_dist`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.workers.worker import GenerationWorker, Worker


def open_worker(settings: dict[str, Any]) -> Worker:
    """Loads the model.

    `settings` are `model`, a directory written by CTranslate2's converter, and `compute_type`, by default the type that
    the converter wrote.
    """
    return GenerationWorker(CT2Engine(settings["model"], settings.get("compute_type", "default")))


class CT2Engine:
    """CTranslate2's generator, on all cores."""

    def __init__(self, model: str, compute_type: str) -> None:
        import ctranslate2

        self._version = ctranslate2.__version__
        num_threads = len(os.sched_getaffinity(0))
        self._generator = ctranslate2.Generator(
            model, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=num_threads
        )
        self._vocabulary = json.loads((Path(model) / "vocabulary.json").read_text())

    def about(self) -> dict[str, Any]:
        return {"engine": "ctranslate2", "version": self._version, "dtype": self._generator.compute_type}

    def stage_pids(self) -> list[int]:
        return [os.getpid()]

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        results = self._generator.generate_batch(
            [[self._vocabulary[token_id] for token_id in prompt] for prompt in prompts],
            max_batch_size=0,
            max_length=num_tokens,
            min_length=num_tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[self._vocabulary[-1]],
        )
        return sum(len(result.sequences_ids[0]) for result in results)

    def close(self) -> None:
        """The generator's threads end with this process."""
