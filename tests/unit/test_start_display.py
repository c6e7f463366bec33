"""What a person sees of a start: bars at a terminal that fit it, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gptj_dist.operate.launch.start_display import LINE_EVERY_S, StartDisplay
from gptj_dist.stages.load_progress import LoadProgress

GB = 10**9


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def loading(num_layers: int, num_bytes: int) -> LoadProgress:
    return LoadProgress(f"{num_layers}/14 layers", num_bytes, 6 * GB)


def frame(display: StartDisplay, width: int, **settings: str) -> list[str]:
    """What a terminal of this width shows now."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, _environ=settings)
    with console.capture() as capture:
        console.print(display)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_stage_has_a_bar_with_bytes_rate_and_time_left_in_one_line(width: int) -> None:
    clock = Clock()
    display = StartDisplay(Console(file=io.StringIO()), clock)
    for second in range(4):
        display.show(
            "Loading the model", {"stage-0": loading(second, second * GB), "stage-1": LoadProgress("starting")}
        )
        clock.now_s += 1.0
    step, first_row, second_row = frame(display, width, NO_COLOR="1")
    assert step == "Loading the model ... 4 s"
    assert "━" in first_row
    assert first_row.rstrip().endswith("3.0 GB of 6.0 GB, 1.0 GB/s, 3 s left")
    assert second_row.split() == ["stage-1", "starting"]
    assert max(map(len, (step, first_row, second_row))) <= width


def test_what_is_loaded_has_no_time_left() -> None:
    display = StartDisplay(Console(file=io.StringIO()), Clock())
    display.show("Loading the model", {"stage-0": loading(14, 7 * GB)})
    assert frame(display, 80)[1].rstrip().endswith("6.0 GB, loaded")


def test_what_is_fetched_from_another_node_names_it_and_reading_it_begins_anew() -> None:
    clock = Clock()
    display = StartDisplay(Console(file=io.StringIO()), clock)
    for second in range(1, 4):
        fetched = LoadProgress("fetching", second * GB, 6 * GB, "10.0.0.2")
        display.show("Loading the model", {"stage-0": fetched})
        clock.now_s += 1.0
    assert frame(display, 120)[1].rstrip().endswith("3.0 GB of 6.0 GB, 1.0 GB/s, 3 s left, from 10.0.0.2")
    display.show("Loading the model", {"stage-0": LoadProgress("fetching", 6 * GB, 6 * GB, "10.0.0.2")})
    assert frame(display, 80)[1].rstrip().endswith("6.0 GB, fetched")
    for num_layers in (1, 3):
        display.show("Loading the model", {"stage-0": loading(num_layers, num_layers * GB)})
        clock.now_s += 1.0
    assert frame(display, 80)[1].rstrip().endswith("3.0 GB of 6.0 GB, 2.0 GB/s, 2 s left")


def test_no_colour_means_none() -> None:
    display = StartDisplay(Console(file=io.StringIO()), Clock())
    display.show("Loading the model", {"stage-0": loading(1, GB)})
    assert "\x1b[" in "".join(frame(display, 80, TERM="xterm"))
    assert "\x1b[" not in "".join(frame(display, 80, NO_COLOR="1", TERM="xterm"))


@pytest.mark.parametrize("is_dumb_terminal", [False, True])
def test_elsewhere_a_step_is_a_line_and_its_details_follow_now_and_then(is_dumb_terminal: bool) -> None:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=is_dumb_terminal, _environ={"TERM": "dumb"}, width=40)
    display = StartDisplay(console, clock)
    display.show("Starting Ray on this machine")
    for num_layers in range(1, 4):
        display.show("Loading the model", {"stage-0": loading(num_layers, GB), "stage-1": LoadProgress("fetching x")})
    clock.now_s += LINE_EVERY_S
    display.show("Loading the model", {"stage-0": loading(9, GB)})
    display.end()
    assert file.getvalue().splitlines() == [
        "Starting Ray on this machine ...",
        "Loading the model (stage-0: 1/14 layers, stage-1: fetching x) ...",
        "Loading the model (stage-0: 9/14 layers) ...",
    ]


def test_at_a_terminal_nothing_of_the_bars_is_left() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ={"TERM": "xterm"}, width=80)
    display = StartDisplay(console)
    display.show("Starting Ray on this machine")
    display.end()
    display.end()
    *_, last = file.getvalue().split("\x1b[?25h")
    assert "Starting" not in last
    assert "\x1b[2K" in file.getvalue()
