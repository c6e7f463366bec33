"""Recognises checkpoints in the layouts of other tools, which are not supported, by their file names alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gptj_dist.checkpoint.files import CONFIG_FILE
from gptj_dist.checkpoint.layouts.detect import is_gptq_name

_ORIGINAL = "use the original checkpoint, in safetensors or PyTorch's form"

_BY_SUFFIX = {
    ".gguf": f"GGUF files of llama.cpp, which gptj-dist does not read: {_ORIGINAL}",
    ".onnx": f"an ONNX export, which gptj-dist does not read: {_ORIGINAL}",
    ".h5": f"weights of TensorFlow, which gptj-dist does not read: {_ORIGINAL}",
    ".msgpack": f"weights of Flax, which gptj-dist does not read: {_ORIGINAL}",
}
_ELSEWHERE = "download the repository and give its directory, with the config.json and tokenizer of the model"
_BY_NAME = {
    "adapter_config.json": (
        "a LoRA adapter, which is not a whole model: merge it into its base model with peft's merge_and_unload(), "
        "save the result and give its directory"
    ),
    "zero_to_fp32.py": "a checkpoint of DeepSpeed: run its zero_to_fp32.py to write pytorch_model.bin",
    "best_model.pt": f"a TorchScript archive of Intel's extension, which gptj-dist does not read: {_ORIGINAL}",
    "openvino_model.xml": f"an export to OpenVINO, which gptj-dist does not read: {_ORIGINAL}",
    "vocabulary.json": f"a model of CTranslate2, which gptj-dist does not read: {_ORIGINAL}",
    "vocabulary.txt": f"a model of CTranslate2, which gptj-dist does not read: {_ORIGINAL}",
}


def kind_of_files(names: Collection[str]) -> str | None:
    """What these files are and what to do, as the end of a sentence; None if they are not recognised."""
    for name, kind in _BY_NAME.items():
        if name in names:
            return kind
    suffixes = (Path(name).suffix for name in sorted(names))
    if (suffix := next((suffix for suffix in suffixes if suffix in _BY_SUFFIX), None)) is not None:
        return _BY_SUFFIX[suffix]
    if any(is_gptq_name(name) for name in names):
        return f"weights of GPTQ-for-LLaMa under a name of their own: {_ELSEWHERE}"
    return f"GGML files: {_ELSEWHERE}" if any("ggml" in name or "ggjt" in name for name in names) else None


def kind_of_directory(directory: Path) -> str | None:
    """Applies `kind_of_files` to a directory's files. Also names a subdirectory that holds a checkpoint."""
    try:
        names = {path.name for path in directory.iterdir()}
    except OSError:
        return None
    inner = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if CONFIG_FILE not in names and inner:
        return f"no checkpoint itself; did you mean {directory / inner[-1]}?"
    return kind_of_files(names)
