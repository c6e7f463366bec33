"""The number of threads follows the cores that other programs leave. On a machine made up for the test."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from gptj_dist.stages.threads import ThreadChooser, Trial, thread_counts

NUM_LAYERS = 28
LAYER_S = 0.001
"""Time of a layer on one thread without other programs."""
SLICE_S = 0.003
"""For this long another program holds a core."""


@dataclass
class Machine:
    """Cores on which layers and busy programs run, and its clocks.

    Whichever threads have to share their core with a program get it half of the time. A layer that needs such a thread
    takes at least half of a program's time slice longer, in which the calling thread waits.

    Args:
        scaling: of n threads, the speed is n to this power.
        num_busy: other programs that always compute.
    """

    num_cores: int
    scaling: float = 0.7
    num_busy: int = 0
    num_threads: int = 0
    now_s: float = 0.0
    computed_s: float = 0.0
    layers_by_threads: dict[int, int] = field(default_factory=dict)

    def set_threads(self, num_threads: int) -> None:
        self.num_threads = num_threads

    def run_layer(self, work: float) -> None:
        seconds = work * LAYER_S / self.num_threads**self.scaling
        is_short_of_cores = self.num_threads + self.num_busy > self.num_cores
        lost_s = 0.0
        if is_short_of_cores:
            lost_s = SLICE_S / 2 if self.num_threads > 1 else seconds * self.num_busy / self.num_cores
        self.now_s += seconds + lost_s
        self.computed_s += seconds
        self.layers_by_threads[self.num_threads] = self.layers_by_threads.get(self.num_threads, 0) + 1


@dataclass
class Stage:
    """A stage that computes one step after the other on a machine."""

    machine: Machine
    most: int
    num_layers: int = NUM_LAYERS

    def __post_init__(self) -> None:
        self.chooser = ThreadChooser(
            self.most,
            self.num_layers,
            self.machine.set_threads,
            lambda: self.machine.now_s,
            lambda: self.machine.computed_s,
        )

    def step(self, work: float = 1.0) -> None:
        self.chooser.begin_step()
        for layer in range(self.num_layers):
            self.machine.run_layer(work)
            self.chooser.end_layer(layer)

    def run_for(self, seconds: float) -> int:
        """Computes steps for some time; returns their number."""
        num_steps, end_s = 0, self.machine.now_s + seconds
        while self.machine.now_s < end_s:
            self.step()
            num_steps += 1
        return num_steps


def steps_with(num_threads: int, machine: Machine, seconds: float) -> int:
    """The number of steps in some time with a fixed number of threads."""
    machine = Machine(machine.num_cores, machine.scaling, machine.num_busy, num_threads)
    num_steps = 0
    while machine.now_s < seconds:
        for _ in range(NUM_LAYERS):
            machine.run_layer(1.0)
        num_steps += 1
    return num_steps


def test_a_quiet_machine_uses_all_threads_and_spends_nothing_on_trials() -> None:
    machine = Machine(num_cores=2)
    Stage(machine, most=2).run_for(20)
    assert set(machine.layers_by_threads) == {2}


@pytest.mark.parametrize("num_busy", [1, 2, 8])
def test_beside_busy_programs_a_stage_keeps_nine_tenths_of_the_rate_of_the_best_number_of_threads(
    num_busy: int,
) -> None:
    machine = Machine(num_cores=2, num_busy=num_busy)
    best = max(steps_with(n, machine, 10) for n in (1, 2))
    assert Stage(machine, most=2).run_for(10) > 0.9 * best


def test_fewer_threads_are_in_use_within_half_a_second_of_load() -> None:
    stage = Stage(Machine(num_cores=2), most=2)
    stage.run_for(1)
    stage.machine.num_busy = 1
    stage.run_for(0.5)
    assert stage.chooser.num_threads == 1


def test_all_threads_are_in_use_again_within_five_seconds_of_the_end_of_load() -> None:
    stage = Stage(Machine(num_cores=2, num_busy=1), most=2)
    stage.run_for(20)
    assert stage.chooser.num_threads == 1
    stage.machine.num_busy = 0
    stage.run_for(5)
    assert stage.chooser.num_threads == 2


def test_one_busy_core_of_sixteen_costs_one_thread_not_all() -> None:
    stage = Stage(Machine(num_cores=16, scaling=0.9, num_busy=1), most=16)
    stage.run_for(10)
    assert stage.chooser.num_threads == 15


def test_fewer_threads_are_found_where_one_less_gains_nothing() -> None:
    stage = Stage(Machine(num_cores=16, scaling=0.9, num_busy=8), most=16)
    stage.run_for(30)
    assert stage.chooser.num_threads == 8


def test_a_stage_keeps_its_threads_where_fewer_are_no_faster_and_tries_them_less_and_less() -> None:
    """Layers of some ms lose little to a program's time slices."""
    machine = Machine(num_cores=2, num_busy=1, scaling=1.0)
    stage = Stage(machine, most=2)
    for _ in range(400):
        stage.step(work=5.0)
    assert stage.chooser.num_threads == 2
    assert 0 < machine.layers_by_threads[1] < 0.02 * machine.layers_by_threads[2]


def test_a_thread_that_has_no_core_of_its_own_gets_no_second_one() -> None:
    machine = Machine(num_cores=2, num_busy=2)
    stage = Stage(machine, most=2)
    stage.run_for(2)
    machine.layers_by_threads.clear()
    stage.run_for(20)
    assert set(machine.layers_by_threads) == {1}


def test_steps_of_unlike_size_do_not_mislead_a_trial() -> None:
    machine = Machine(num_cores=2, num_busy=1)
    stage = Stage(machine, most=2)
    for number in range(400):
        stage.step(work=20.0 if number % 3 == 0 else 1.0)
    assert stage.chooser.num_threads == 1


def test_the_first_half_of_a_long_step_decides_no_trial() -> None:
    trial, now_s = Trial(2, 1, NUM_LAYERS), 0.0
    for layer_s in (0.0005, 0.0005, 0.02):  # with either number of threads
        trial.begin_step(now_s)
        for layer in range(NUM_LAYERS):
            now_s += layer_s
            trial.end_layer(layer, now_s)
            assert not (trial.is_decided and trial.is_other_better)
    assert trial.is_decided


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_stages_of_few_layers_choose_as_well(num_layers: int) -> None:
    stage = Stage(Machine(num_cores=2, num_busy=1), most=2, num_layers=num_layers)
    stage.run_for(5)
    assert stage.chooser.num_threads == 1


def test_one_thread_is_all_there_is_on_one_core() -> None:
    machine = Machine(num_cores=1, num_busy=3)
    Stage(machine, most=1).run_for(5)
    assert set(machine.layers_by_threads) == {1}


def test_what_follows_the_layers_of_a_trial_has_the_present_number_of_threads() -> None:
    machine = Machine(num_cores=2, num_busy=1)
    stage = Stage(machine, most=2)
    for _ in range(50):
        stage.step()
        assert machine.num_threads == stage.chooser.num_threads


def test_the_numbers_to_choose_from() -> None:
    assert [thread_counts(n) for n in (1, 2, 4, 16)] == [(1,), (1, 2), (1, 2, 3, 4), (1, 4, 8, 12, 15, 16)]
