"""Installs torch in the environment of the interpreter that runs it; on a machine without an NVIDIA GPU, a CPU build.

The package index that pip is configured for is tried first. Where its torch would bring gigabytes of CUDA packages, or
where it has none, the build comes from PyTorch's own index of CPU wheels.
"""

import json
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_PREFIXES = ("nvidia-", "cuda-")


def main(version, index_options):
    """Installs torch of this version, and says from where.

    Args:
        index_options: options of pip that name an index; empty for the configured one with PyTorch's to fall back on.
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
    """The number of CUDA packages that torch from an index needs, and why that is unknown, if it is."""
    options = ["--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    done = pip("install", *options, *index_options, f"torch=={version}", capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip failed"]
        return None, lines[-1]
    wheels = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    needed = [name for wheel in wheels for name in wheel.get("requires_dist", []) if name.startswith(CUDA_PREFIXES)]
    return len(needed), None


def install(requirement, index_options):
    """Installs a package, or ends the program with what can be done."""
    if pip("install", "--quiet", *index_options, requirement).returncode:
        sys.exit(
            f"{requirement} could not be installed, see above. Where {CPU_INDEX} cannot be reached, name an index that "
            'has CPU builds: make serve TORCH_INDEX="--index-url URL"'
        )


def has_nvidia_gpu():
    """Whether NVIDIA's driver lists a GPU."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def pip(*arguments, **options):
    """Runs pip in this environment."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False, **options)


def say(text):
    """Prints a line at once."""
    print(f"torch: {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
