"""The command line: `gptj-dist` and `python -m gptj_dist`."""

import signal


def main() -> None:
    """Loads the commands and runs one. Ctrl-C while they load ends the process without a traceback."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from gptj_dist.cli import main as run

    signal.signal(signal.SIGINT, on_interrupt)
    run()


if __name__ == "__main__":
    main()
