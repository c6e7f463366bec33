"""Compares the logits of two checkpoints bit by bit, for example of a pickle and of its copy in safetensors.

    python -m benchmarks.same_logits /path/to/one /path/to/other --dtype bfloat16 --stages 2

Loads one after the other, in this process. The last line on standard output is one JSON document; `read_gb` counts the
bytes that the process read while it loaded, from the disk or from the page cache. Linux only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from gptj_dist.config import BLOCK_SIZE_TOKENS, PipelineConfig
from gptj_dist.engine.plan import Chunk, NewRequest, Plan
from gptj_dist.params import SamplingParams
from gptj_dist.stages.local import load_local

NUM_PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, help="directories")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stages", type=int, default=2)
    args = parser.parse_args()
    (one, first), (other, second) = (last_logits(model, args.dtype, args.stages) for model in args.models)
    figures = {"models": [first, second], "dtype": args.dtype, "is_equal": torch.equal(one, other)}
    print(json.dumps(figures | {"max_abs_difference": float((one - other).abs().max())}))


def last_logits(model: str, dtype: Any, stages: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits [1, vocab_size] of a prompt's last row, and the cost of loading."""
    begin, bytes_before = time.perf_counter(), bytes_read()
    pipeline, runners = load_local(PipelineConfig(model, dtype=dtype, stages=stages, kv_cache_gb=0.5, max_batch_size=1))
    loading = {
        "model": model,
        "weights_gb": round(sum(report.weight_bytes for report in pipeline.reports) / 1e9, 3),
        "read_gb": round((bytes_read() - bytes_before) / 1e9, 3),
        "seconds_to_load": round(time.perf_counter() - begin, 1),
    }
    token_ids = tuple((7919 * i) % pipeline.blueprint.model.eos_token_ids[0] for i in range(NUM_PROMPT_TOKENS))
    request = NewRequest(1, SamplingParams(), noise_key=0, num_prompt_tokens=0)
    chunk = Chunk(1, 0, token_ids, tuple(range(-(-NUM_PROMPT_TOKENS // BLOCK_SIZE_TOKENS))), samples=True)
    plan = Plan(1, new_requests=(request,), chunks=(chunk,), released=())
    hidden: torch.Tensor | None = None
    for runner in runners:
        hidden = runner.forward(plan, hidden)
    assert hidden is not None, "there is a stage"
    return hidden, loading


def bytes_read() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    main()
