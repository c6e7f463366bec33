"""Measures what LoRA adapters cost: decoding with eight at once, and loading one beside a running stream.

    python -m benchmarks.adapters deep
    python -m benchmarks.adapters deep --rank 64                  29 MB an adapter, as much as rank 16 of GPT-J-6B

`deep` is a directory that `gptj-dist synth deep deep` makes. Decoding: 32 requests at once in one process, greedy,
without and with adapters on q and v in turn; `speed` is the median over rounds of the time without over that with.

Loading: `gptj-dist serve MODEL --adapter-dir DIR` streams a completion. Meanwhile a request names an adapter for the
first time, and then once more; each has one output token. `load_ms` is how much later the first one's token comes, the
median over adapters. The gaps are the longest times without a frame of the running stream, during the first requests
and during the others. The last line on standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from benchmarks.figures import machine, print_document
from benchmarks.servers import started
from benchmarks.sse_client import completion_body, stream_completion
from gptj_dist import LLM, AdapterChoice, SamplingParams
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import ModelConfig

NUM_ADAPTERS = 8
BATCH = 32
INPUT_LEN = 16
OUTPUT_LEN = 64
STREAM_TOKENS = 1500
MODULES = ("q_proj", "v_proj")
FRAME_TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = read_model_config(resolve_model(args.model))
    with tempfile.TemporaryDirectory() as directory:
        paths = [write_lora(Path(directory, f"adapter-{i}"), config, args.rank, i) for i in range(NUM_ADAPTERS)]
        figures = {
            "decode": decode(args.model, args.dtype, paths, args.rounds),
            "loading": loading(args.model, args.dtype, paths),
        }
    print_document("adapters", {"machine": machine(), "model": args.model, "rank": args.rank, **figures})


def write_lora(directory: Path, config: ModelConfig, rank: int, seed: int) -> Path:
    """Writes a random adapter on q and v of all layers, in PEFT's layout."""
    directory.mkdir()
    noise, width = torch.Generator().manual_seed(seed), config.d_model
    tensors = {
        f"base_model.model.transformer.h.{layer}.attn.{module}.{part}.weight": torch.randn(shape, generator=noise)
        * 0.01
        for layer in range(config.num_layers)
        for module in MODULES
        for part, shape in (("lora_A", (rank, width)), ("lora_B", (width, rank)))
    }
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": MODULES}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def decode(model: str, dtype: str, paths: Sequence[Path], num_rounds: int) -> dict[str, float]:
    """Tokens per second without and with adapters."""
    plain = SamplingParams(OUTPUT_LEN, temperature=0, ignore_eos=True)
    adapted = [
        SamplingParams(OUTPUT_LEN, temperature=0, ignore_eos=True, adapters=(AdapterChoice(path.name),))
        for path in paths
    ]
    prompts = [list(range(first, first + INPUT_LEN)) for first in range(BATCH)]
    with LLM(model, dtype=dtype, adapters={path.name: path for path in paths}) as llm:

        def seconds(params: Sequence[SamplingParams]) -> float:
            begin_s = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - begin_s

        without, with_adapters = [plain] * BATCH, [adapted[i % len(adapted)] for i in range(BATCH)]
        seconds(without), seconds(with_adapters)  # the first run reads the adapters
        rounds = [(seconds(without), seconds(with_adapters)) for _ in range(num_rounds)]
    tokens = BATCH * OUTPUT_LEN
    return {
        "tokens_per_s_without": tokens / statistics.median(one for one, _ in rounds),
        "tokens_per_s_with": tokens / statistics.median(other for _, other in rounds),
        "speed": statistics.median(one / other for one, other in rounds),
    }


class Use(NamedTuple):
    """A request that names an adapter: when it began, and when its token came."""

    begin_s: float
    end_s: float


def loading(model: str, dtype: str, paths: Sequence[Path]) -> dict[str, float]:
    """What the first use of an adapter adds, to itself and to a running stream."""
    arguments = ["--dtype", dtype, "--adapter-dir", str(paths[0].parent)]
    with started(model, arguments) as (base, _):
        frame_s, first, again = asyncio.run(_load_beside_a_stream(base, model, [path.name for path in paths]))
    return {
        "load_ms": 1000
        * statistics.median(_seconds(one) - _seconds(two) for one, two in zip(first, again, strict=True)),
        "longest_gap_ms": 1000 * max(_gap_s(frame_s, use) for use in first),
        "longest_gap_without_loading_ms": 1000 * max(_gap_s(frame_s, use) for use in again),
    }


async def _load_beside_a_stream(
    base: str, model: str, names: Sequence[str]
) -> tuple[list[float], list[Use], list[Use]]:
    prompt, frame_s = list(range(INPUT_LEN)), list[float]()

    async def use(name: str) -> Use:
        """Waits for a frame of the stream before and after, so that no gap belongs to two requests."""
        await next_frame()
        record = await stream_completion(base, completion_body(name, prompt, 1), INPUT_LEN)
        if record.error is not None:
            raise SystemExit(f"a request failed: {record.error}")
        await next_frame()
        return Use(record.begin_s, record.frame_s[0])

    async def next_frame() -> None:
        has_come.clear()
        async with asyncio.timeout(FRAME_TIMEOUT_S):
            await has_come.wait()

    has_come = asyncio.Event()

    def note(_frame: bytes) -> None:
        frame_s.append(time.perf_counter())
        has_come.set()

    body = completion_body(model, prompt, STREAM_TOKENS)
    running = asyncio.create_task(stream_completion(base, body, INPUT_LEN, take=note))
    uses = [(await use(name), await use(name)) for name in names]
    if running.done():
        raise SystemExit("the stream ended before all adapters were loaded")
    running.cancel()
    return frame_s, [first for first, _ in uses], [again for _, again in uses]


def _seconds(use: Use) -> float:
    return use.end_s - use.begin_s


def _gap_s(frame_s: Sequence[float], use: Use) -> float:
    """The longest gap between frames that overlaps a use."""
    return max(later - earlier for earlier, later in pairwise(frame_s) if later > use.begin_s and earlier < use.end_s)


if __name__ == "__main__":
    main()
