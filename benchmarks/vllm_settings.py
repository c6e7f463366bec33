"""Settings that give vLLM, offline and as a server, the same cores and work as our engine. Stdlib only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

MAX_MODEL_LEN = 2048
KV_CACHE_GB = 4


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Splits settings into environment variables and arguments of vLLM's `LLM`.

    Args:
        settings: `stages`, the stages of a pipeline, which share the cores evenly; `bind`, another share of the cores
            in vLLM's notation; `kv_cache_gb`; all others are vLLM's own arguments.
    """
    arguments = {"max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": False, **settings}
    stages = arguments.pop("stages", 1)
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": str(arguments.pop("bind", share_cores(stages, sorted(os.sched_getaffinity(0))))),
        "VLLM_CPU_KVCACHE_SPACE": str(arguments.pop("kv_cache_gb", KV_CACHE_GB)),
    }
    if stages > 1:
        arguments |= {"pipeline_parallel_size": stages, "distributed_executor_backend": "mp"}
    return environment, arguments


def share_cores(num_stages: int, cores: list[int]) -> str:
    """The cores of each stage in vLLM's notation, such as `0,1|2,3`."""
    size = max(1, len(cores) // num_stages)
    shares = [cores[i * size : (i + 1) * size] for i in range(num_stages)]
    return "|".join(",".join(map(str, share)) for share in shares)
