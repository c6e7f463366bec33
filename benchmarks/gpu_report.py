"""Tests and measures a GPU in one command, on a machine with torch, Triton and an NVIDIA GPU; Ray is not needed.

    python -m benchmarks.gpu_report
    python -m benchmarks.gpu_report --device cpu --shape tiny --batches 1 2 --context 16       to try the command itself

First runs `tests/gpu`, which also needs pytest, transformers and tokenizers. Then makes a model of GPT-J-6B's shape
with random weights on the device, and times a prompt and decode steps. Each time is compared with the device's limit:
the larger of the time to read weights, keys and values at the rate of a large copy or sum, and the time to compute at
the rate of a large matrix product. Both rates are measured beforehand. Last it times the product of the largest matrix
with weights of the type, of 8 and of 4 bits.

The report takes at most `--budget-s` seconds; cases that did not start in time are listed in `skipped`. Prints a
Markdown table for `docs/performance.md`. The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import machine, print_document
from benchmarks.worker_process import ROOT
from gptj_dist.config import BLOCK_SIZE_TOKENS, DeviceKind, DTypeName, LayerRange, ModelConfig
from gptj_dist.model.block_cache import BlockCache
from gptj_dist.model.gptj import StageModel
from gptj_dist.model.inputs import MicroBatch, Span, to_device
from gptj_dist.model.kv_cache import make_cache
from gptj_dist.model.linear import Linear, make_linear
from gptj_dist.model.quantized import make_quantized_linear, quantize
from gptj_dist.planning.cost import Chunks, step_work
from gptj_dist.quantization import BITS_OF
from gptj_dist.sizes import ceil_div

SHAPES = {
    "6b": ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,)),
    "tiny": ModelConfig(512, 2, 64, 4, 8, 256, 128, (0,)),
}
DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
BUDGET_S = 480.0
TESTS_SHARE = 0.5
"""Share of the budget after which the tests are stopped."""

CASE_RESERVE_S = 20.0
"""A case starts only if this much time, or a tenth of the budget, is left."""

CASE_S = 1.0
MIN_REPEATS = 3
LIMIT_BYTES = {"cuda": 2 << 30, "cpu": 1 << 26}
LIMIT_MATRIX = {"cuda": 8192, "cpu": 512}
WEIGHT_STD = 0.02


class Budget:
    """Time that the report may take, beginning now.

    Args:
        case_s: for how long each measurement is repeated.
        clock: returns seconds.
    """

    def __init__(self, seconds: float, case_s: float = CASE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.case_s = case_s
        self._seconds = seconds
        self._clock = clock
        self._begin_s = clock()

    @property
    def used_s(self) -> float:
        return self._clock() - self._begin_s

    @property
    def tests_s(self) -> float:
        """Seconds that the tests may take."""
        return TESTS_SHARE * self._seconds

    def allows_a_case(self) -> bool:
        """Whether enough time is left for one more measurement."""
        return self._seconds - self.used_s > min(CASE_RESERVE_S, self._seconds / 10)


def main() -> None:
    args = _parser().parse_args()
    budget = Budget(args.budget_s, args.case_s)
    kind: DeviceKind = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if kind == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU; --device cpu --shape tiny tries the command without one")
    device = torch.device(kind)
    tests = {"skipped": "--no-tests"} if args.no_tests else run_tests(budget.tests_s)
    report = measure(device, best_dtype(device), SHAPES[args.shape], args.batches, args.context, budget)
    print(markdown(report))
    about = {"machine": machine(), "device": name_of(device), "torch": torch.__version__, "shape": args.shape}
    print_document("gpu_report", {**about, "tests": tests, **report, "seconds": budget.used_s})


def run_tests(timeout_s: float) -> dict[str, Any]:
    """Runs `tests/gpu` without the configuration of the other tests, which imports Ray."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", os.devnull, "--rootdir", str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"stopped after {timeout_s:.0f} s"}
    print(done.stdout, flush=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return {"passed": done.returncode == 0, "summary": lines[-1]}


def best_dtype(device: torch.device) -> DTypeName:
    """float32 on a CPU; on a GPU bfloat16 from compute capability 8.0 on, float16 before."""
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure(
    device: torch.device,
    dtype: DTypeName,
    config: ModelConfig,
    batches: Sequence[int],
    context: int,
    budget: Budget,
) -> dict[str, Any]:
    """The device's limits; for each case its rate, limit and share; in `skipped` the reason for each missing case."""
    limits = measure_limits(device, DTYPES[dtype], budget.case_s)
    report: dict[str, Any] = {"dtype": dtype, "context": context, **limits, "cases": {}, "skipped": {}}
    cases = {f"prefill {context} tokens": Chunks(1, context, context)}
    cases |= {f"decode B={batch}": Chunks(batch, 1, context) for batch in batches}
    model, num_requests = largest_model(config, dtype, device, batches, context)
    for name, chunks in cases.items():
        if model is None or chunks.num_requests > num_requests:
            report["skipped"][name] = "the memory is too small"
            continue
        if not budget.allows_a_case():
            report["skipped"][name] = f"{budget.used_s:.0f} s of the budget were used"
            continue
        step_s = time_of(partial(model.step, chunks), device, budget.case_s)
        kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
        work = step_work(config, LayerRange.whole(config.num_layers), dtype, kind, [chunks])
        num_bytes, num_flop = work.weight_bytes + work.kv_bytes, work.matrix_flop + work.attention_flop
        limit_s = max(num_bytes / limits["bytes_per_s"], num_flop / limits["flop_per_s"])
        report["cases"][name] = {
            "step_ms": 1000 * step_s,
            "tokens_per_s": chunks.num_rows / step_s,
            "limit_tokens_per_s": chunks.num_rows / limit_s,
            "share_of_limit": limit_s / step_s,
        }
    del model  # its memory
    report["products"] = measure_products(config, DTYPES[dtype], device, batches, budget)
    return report


@torch.inference_mode()
def measure_products(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, batches: Sequence[int], budget: Budget
) -> dict[str, dict[str, float]]:
    """Milliseconds of a product [vocab_size, d_model], by the kind of its weights and the number of rows."""
    weight = torch.randn(config.vocab_size, config.d_model, device=device) * WEIGHT_STD
    linears: dict[str, Linear] = {str(dtype).removeprefix("torch."): make_linear(weight.to(dtype), None)}
    for name, bits in BITS_OF.items():
        linears[name] = make_quantized_linear(quantize(weight, bits), None, dtype)
    rows = torch.randn(max(batches), config.d_model, device=device).to(dtype)
    return {
        name: {
            f"B={batch}": 1000 * time_of(partial(linear, rows[:batch]), device, budget.case_s)
            for batch in batches
            if budget.allows_a_case()
        }
        for name, linear in linears.items()
    }


def largest_model(
    config: ModelConfig, dtype: DTypeName, device: torch.device, batches: Sequence[int], context: int
) -> tuple[RandomModel | None, int]:
    """The model with room for the largest of `batches` that fits, and that batch; None and 0 if none fits."""
    for num_requests in sorted(batches, reverse=True):
        try:
            return RandomModel(config, dtype, device, num_requests, context), num_requests
        except torch.OutOfMemoryError:
            print(f"no memory for {num_requests} requests", flush=True)
        torch.cuda.empty_cache()
    return None, 0


class RandomModel:
    """A whole model with random weights made on the device, and the requests that its steps are timed with.

    Args:
        max_requests: requests in the KV cache.
        context: tokens of each request.
    """

    def __init__(
        self, config: ModelConfig, dtype: DTypeName, device: torch.device, max_requests: int, context: int
    ) -> None:
        self._device = device
        self._vocab_size = config.vocab_size
        layers = LayerRange.whole(config.num_layers)
        with torch.inference_mode():
            self._model = StageModel(config, layers, _fill, DTYPES[dtype], device)
            num_blocks = ceil_div(context, BLOCK_SIZE_TOKENS)
            self._cache = make_cache(
                config, config.num_layers, max_requests * num_blocks, max_requests, context, DTYPES[dtype], device
            )
            for request_id in range(max_requests):
                self._cache.add(request_id)
                self._cache.extend(request_id, range(request_id * num_blocks, (request_id + 1) * num_blocks))
                self._compute(_batch([request_id], 0, context))  # fills the keys and values
            self._steps = self._recorded_steps(max_requests) if isinstance(self._cache, BlockCache) else None

    @torch.inference_mode()
    def step(self, chunks: Chunks) -> list[int]:
        """Computes a step at the same positions each time; returns the most likely next token of each request."""
        batch = _batch(range(chunks.num_requests), chunks.context_tokens - chunks.num_tokens, chunks.num_tokens)
        if self._steps is not None and self._steps.has(batch):
            logits = self._steps(batch, self._token_ids(batch))
        else:
            logits = self._compute(batch)
        token_ids: list[int] = logits.argmax(dim=-1).tolist()
        return token_ids

    def _recorded_steps(self, max_requests: int) -> Any:
        """The CUDA graphs that a stage on a GPU uses for single rows. Imported here, as they need Triton."""
        from gptj_dist.model.graphs import GraphRecorder, RecordedSteps, batch_sizes

        assert isinstance(self._cache, BlockCache)
        return RecordedSteps(self._model, self._cache, batch_sizes(max_requests), GraphRecorder())

    def _compute(self, batch: MicroBatch) -> Tensor:
        """Logits of each request's last row: float32 [requests, vocab_size]."""
        hidden = self._model.forward(self._model.embed(self._token_ids(batch)), batch, self._cache)
        last_rows = torch.tensor([span.row + span.num_tokens - 1 for span in batch.spans])
        return self._model.logits(hidden[to_device(last_rows, self._device)])

    def _token_ids(self, batch: MicroBatch) -> Tensor:
        return batch.positions * 7919 % self._vocab_size


def _fill(_name: str, tensor: Tensor) -> None:
    """Fills a tensor with random weights; used in place of reading a checkpoint."""
    tensor.normal_(0, WEIGHT_STD)


def _batch(request_ids: Sequence[int], start: int, num_tokens: int) -> MicroBatch:
    """A micro-batch of the same `num_tokens` positions, from `start` on, of each request."""
    spans = tuple(Span(id_, i * num_tokens, start, num_tokens) for i, id_ in enumerate(request_ids))
    return MicroBatch(spans, torch.arange(start, start + num_tokens).repeat(len(spans)))


def measure_limits(device: torch.device, dtype: torch.dtype, case_s: float) -> dict[str, float]:
    """Bytes/s of the better of a large copy and a large sum, and FLOP/s of a large matrix product."""
    source = torch.zeros(LIMIT_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    num_bytes, size = source.numel() * 4, LIMIT_MATRIX[device.type]
    copy_s, sum_s = (time_of(run, device, case_s) for run in (partial(target.copy_, source), source.sum))
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_s = time_of(partial(torch.mm, a, b), device, case_s)
    return {"bytes_per_s": max(2 * num_bytes / copy_s, num_bytes / sum_s), "flop_per_s": 2.0 * size**3 / product_s}


def time_of(run: Callable[[], object], device: torch.device, case_s: float) -> float:
    """Median seconds of a run, repeated for `case_s`. The first run, which may compile, does not count."""

    def timed() -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    timed()
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or sum(seconds) < case_s:
        seconds.append(timed())
    return statistics.median(seconds)


def markdown(report: dict[str, Any]) -> str:
    """The Markdown table of a report."""
    gb_per_s, tflop_per_s = report["bytes_per_s"] / 1e9, report["flop_per_s"] / 1e12
    head = f"{report['dtype']}, context {report['context']}, {gb_per_s:.4g} GB/s, {tflop_per_s:.4g} TFLOP/s"
    rows = [f"| {head} | tokens/s | limit | share |", "|---|---|---|---|"]
    for name, figures in report["cases"].items():
        rate, limit = figures["tokens_per_s"], figures["limit_tokens_per_s"]
        rows.append(f"| {name} | {rate:.0f} | {limit:.0f} | {figures['share_of_limit']:.2f} |")
    rows += [f"| {name} | {reason} | | |" for name, reason in report["skipped"].items()]
    rows += ["", "| product | weights | ms |", "|---|---|---|"]
    rows += [
        f"| {batch} | {name} | {ms:.3g} |" for name, times in report["products"].items() for batch, ms in times.items()
    ]
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="6b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], help="requests in a decode step")
    parser.add_argument("--context", type=int, default=512, help="tokens of each request and of the prompt")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="most seconds in total")
    parser.add_argument("--case-s", type=float, default=CASE_S, help="for how long each measurement is repeated")
    parser.add_argument("--no-tests", action="store_true", help="skip tests/gpu")
    return parser


if __name__ == "__main__":
    main()
