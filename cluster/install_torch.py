"""Installs torch for the interpreter that runs this script. Without an NVIDIA GPU it installs a CPU build.

Tries pip's configured index first. If torch there needs gigabytes of CUDA packages, or is missing, installs it from
PyTorch's own index of CPU wheels.
"""

import json
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_PREFIXES = ("nvidia-", "cuda-")


def main(version, index_options):
    """Installs torch of this version, and prints which index it comes from.

    Args:
        index_options: pip's options for an index; empty for the configured one, then PyTorch's.
    """
    if has_nvidia_gpu():
        say("this machine has an NVIDIA GPU: pip chooses torch along with the other packages")
        return
    num_cuda, problem = cuda_packages(version, index_options)
    if num_cuda == 0:
        say(f"installing the CPU build of torch {version} from {' '.join(index_options) or 'the configured index'}")
        install(f"torch=={version}", index_options)
        return
    reason = problem or f"that torch {version} needs {num_cuda} CUDA packages, and this machine has no NVIDIA GPU"
    if index_options:
        sys.exit(f"{' '.join(index_options)} has no CPU build of torch {version}: {reason}")
    say(f"the configured index has no CPU build of torch {version} ({reason}): installing it from {CPU_INDEX}")
    install(f"torch=={version}+cpu", ["--extra-index-url", CPU_INDEX])


def cuda_packages(version, index_options):
    """The number of CUDA packages that torch from an index needs, and None; or None, and why it is unknown."""
    options = ["--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    done = pip("install", *options, *index_options, f"torch=={version}", capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip failed"]
        return None, lines[-1]
    wheels = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    needed = [name for wheel in wheels for name in wheel.get("requires_dist", []) if name.startswith(CUDA_PREFIXES)]
    return len(needed), None


def install(requirement, index_options):
    """Installs a package, or exits with a message that says what to do."""
    if pip("install", "--quiet", *index_options, requirement).returncode:
        sys.exit(
            f"{requirement} could not be installed, see above. Where {CPU_INDEX} cannot be reached, name an index that "
            'has CPU builds: make serve TORCH_INDEX="--index-url URL"'
        )


def has_nvidia_gpu():
    """Whether NVIDIA's driver lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)  # nosec B607  # as in a shell
        return listed.returncode == 0
    except OSError:
        return False


def pip(*arguments, **options):
    """Runs pip in this environment."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False, **options)


def say(text):
    """Prints a line with a prefix, unbuffered."""
    print(f"torch: {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
