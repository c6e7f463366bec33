"""OpenVINO GenAI's engine, run by the interpreter of its own environment. Does not import `gptj_dist`."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.workers.worker import GenerationWorker, Worker

PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


def open_worker(settings: dict[str, Any]) -> Worker:
    """Loads the model.

    `settings` are `model`, a directory written by `optimum-cli export openvino`; `dtype` of the activations; `backend`,
    SDPA (all prompts are one batch; the default) or PA (paged attention, continuous batching); and `kv_cache_gb` of PA.
    The KV cache has OpenVINO's own type, 8 bits a number.
    """
    paged = {"PA": True, "SDPA": False}[settings.get("backend", "SDPA")]
    return GenerationWorker(OpenVINOEngine(settings["model"], settings["dtype"], paged, settings.get("kv_cache_gb", 2)))


class OpenVINOEngine:
    """OpenVINO GenAI's pipeline without a prefix cache, on all cores."""

    def __init__(self, model: str, dtype: str, paged: bool, kv_cache_gb: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai = numpy, openvino, openvino_genai
        self._paged = paged
        properties = {
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
            "ENABLE_CPU_PINNING": False,
        }
        if paged:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.cache_size, scheduler.enable_prefix_caching = kv_cache_gb, False
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        else:
            self._pipeline = openvino_genai.LLMPipeline(model, "CPU", **properties, ATTENTION_BACKEND="SDPA")

    def about(self) -> dict[str, Any]:
        return {"engine": "openvino_genai", "version": self._genai.__version__}

    def stage_pids(self) -> list[int]:
        return [os.getpid()]

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.ignore_eos, config.do_sample = True, False
        if self._paged:
            results = self._pipeline.generate([self._rows([ids]) for ids in prompts], [config] * len(prompts))
            return sum(len(result.m_generation_ids[0]) for result in results)
        mask = self._rows([[1] * len(ids) for ids in prompts])
        inputs = self._genai.TokenizedInputs(self._rows(prompts), mask)
        return sum(map(len, self._pipeline.generate(inputs, config).tokens))

    def close(self) -> None:
        """The pipeline's threads end with this process."""

    def _rows(self, rows: list[list[int]]) -> Any:
        return self._openvino.Tensor(self._numpy.array(rows, dtype=self._numpy.int64))
