"""Reads pip's installation report from standard input; refuses a torch that would bring gigabytes of CUDA packages."""

import json
import sys

CUDA_PREFIXES = ("nvidia-", "cuda-")


def main() -> None:
    """Exits with a hint if the wheel that pip chose needs CUDA packages."""
    wheels = [item["metadata"] for item in json.load(sys.stdin)["install"]]
    needed = [name for wheel in wheels for name in wheel.get("requires_dist", []) if name.startswith(CUDA_PREFIXES)]
    if needed:
        sys.exit(
            f"This machine has no NVIDIA GPU, but the torch that pip finds needs {len(needed)} CUDA packages.\n"
            'Name an index with CPU wheels: make serve TORCH_INDEX="--index-url <URL of PyTorch\'s CPU wheels>"'
        )


if __name__ == "__main__":
    main()
