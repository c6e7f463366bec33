"""vLLM's engine, run by the interpreter of its own environment. Does not import `gptj_dist`."""

from __future__ import annotations

from typing import Any

from benchmarks.vllm_settings import split_settings
from benchmarks.workers.worker import GenerationWorker, Worker


def open_worker(settings: dict[str, Any]) -> Worker:
    """Loads the model. `settings` are those of `vllm_settings`, and arguments of vLLM's `LLM`."""
    return GenerationWorker(VLLMEngine(settings))


class VLLMEngine:
    """vLLM's offline engine without prefix cache, text and statistics, which our engine does not compute either."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import os

        environment, arguments = split_settings(settings)
        os.environ.update(environment)
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(disable_log_stats=True, **arguments)

    def about(self) -> dict[str, Any]:
        return {"engine": "vllm", "version": self._vllm.__version__}

    def stage_pids(self) -> list[int]:
        return []

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [self._vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        """vLLM's processes end with this one."""
