"""Times the matrix library alone on a model's matrices: an upper limit for any engine that uses it.

Makes as many layers as the model has, up to `MOST_BYTES` of weights: enough that they are read from memory, not from a
cache.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.workers.worker import Worker
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import ModelConfig
from gptj_dist.model.linear import Linear, make_linear

MOST_BYTES = 2_000_000_000


def open_worker(settings: dict[str, Any]) -> Worker:
    """Packs random matrices. `settings` are `model` and `dtype`."""
    config = read_model_config(resolve_model(settings["model"], None))
    name = config.dtype if settings["dtype"] == "auto" else settings["dtype"]
    return LimitsWorker(config, {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name])


class LimitsWorker:
    """Times passes over the matrices. A request has the number of `rows`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._num_layers = max(1, min(config.num_layers, MOST_BYTES // self._layer_bytes))
        d_model, d_ff = config.d_model, config.d_ff
        self._fan_in = [self._linear(3 * d_model + d_ff, d_model) for _ in range(self._num_layers)]
        self._fan_out = [self._linear(d_model, d_model + d_ff) for _ in range(self._num_layers)]
        self._head = self._linear(config.vocab_size, d_model)

    def about(self) -> dict[str, Any]:
        return {"layers": self._num_layers, "dtype": str(self._dtype), "num_threads": torch.get_num_threads()}

    @torch.inference_mode()
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Rates of one pass, in which `lm_head` gets one row. The time of the layers is scaled to the whole model."""
        rows: int = request["rows"]
        x = torch.randn(rows, self._config.d_model).to(self._dtype)
        joined = torch.randn(rows, self._config.d_model + self._config.d_ff).to(self._dtype)
        begin = time.perf_counter()
        for fan_in, fan_out in zip(self._fan_in, self._fan_out, strict=True):
            fan_in(x)
            fan_out(joined)
        layers_s = (time.perf_counter() - begin) * self._config.num_layers / self._num_layers
        begin = time.perf_counter()
        self._head(x[:1])
        return self._rates(rows, layers_s, time.perf_counter() - begin)

    def close(self) -> None:
        """Nothing to end."""

    @property
    def _layer_bytes(self) -> int:
        return self._config.layer_matrix_parameters * self._dtype.itemsize

    def _linear(self, out_features: int, in_features: int) -> Linear:
        row = torch.randn(in_features).mul(0.02).to(self._dtype)
        return make_linear(row.repeat(out_features, 1), torch.zeros(out_features, dtype=self._dtype))

    def _rates(self, rows: int, layers_s: float, head_s: float) -> dict[str, Any]:
        head_bytes = self._config.embedding_parameters * self._dtype.itemsize
        num_bytes = self._config.num_layers * self._layer_bytes + head_bytes
        num_products = self._config.num_layers * self._config.layer_matrix_parameters * rows
        return {
            "tokens_per_s": rows / (layers_s + head_s),
            "gb_per_s": num_bytes / (layers_s + head_s) / 1e9,
            "gflop_per_s": 2 * num_products / layers_s / 1e9,
        }
