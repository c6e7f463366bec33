"""Names of the files that a checkpoint of the Hugging Face layout consists of. Stdlib only; opens nothing."""

from __future__ import annotations

from dataclasses import dataclass

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

QUANTIZE_FILES = ("quantize_config.json", "quant_config.json")
"""What AutoGPTQ and AutoAWQ wrote beside quantised weights."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, slots=True)
class WeightForm:
    """One of the forms that weights are kept in.

    Args:
        single: the file, where there is one.
        index: the JSON file that says which of several files holds which tensor.
    """

    single: str
    index: str


SAFETENSORS = WeightForm("model.safetensors", "model.safetensors.index.json")
PICKLED = WeightForm("pytorch_model.bin", "pytorch_model.bin.index.json")

WEIGHT_FORMS = (SAFETENSORS, PICKLED)
"""The forms that are read; where a checkpoint has both, the first one is."""
