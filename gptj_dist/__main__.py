"""The command line: `gptj-dist` and `python -m gptj_dist`."""

import signal
import sys


def main() -> None:
    """Loads the commands and runs one. Ctrl-C while they load ends the process without a traceback."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from gptj_dist.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"gptj-dist: the package {error.name} is missing in {sys.executable}: `pip install gptj-dist` adds it")

    signal.signal(signal.SIGINT, on_interrupt)
    run()


if __name__ == "__main__":
    main()
