"""The bodies of `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`, as vLLM has them."""

from __future__ import annotations

from typing import ClassVar

from gptj_dist.answers.schema.base import Body


class LoadAdapterRequest(Body):
    """An adapter to be loaded.

    Args:
        lora_name: what requests call it.
        lora_path: its directory, the same on every node.
        load_inplace: replace the adapter of that name. What is being generated keeps the one that it has.
    """

    unserved: ClassVar = {"is_3d_lora_weight": False}

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(Body):
    """An adapter to be forgotten. What is being generated keeps it.

    Args:
        lora_name: what requests call it.
    """

    hints: ClassVar = frozenset(("lora_int_id",))

    lora_name: str
