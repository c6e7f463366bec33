"""A stage as a Ray actor: connects a `StageRunner` to its edges. Only the actor's process imports torch."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from gptj_dist import garbage
from gptj_dist.config import DTypeName, LayerRange
from gptj_dist.engine.clock import SteadyClock
from gptj_dist.engine.plan import Result, StageTiming
from gptj_dist.errors import CheckpointError
from gptj_dist.interfaces import address_of
from gptj_dist.logs import LogSettings, open_log, values
from gptj_dist.params import AdapterSource
from gptj_dist.planning.moves import LayerMove
from gptj_dist.stages.blueprint import DeviceReport, StageReport, StageSpec
from gptj_dist.stages.cores import CoreClaim, LoneCores, claim_cores
from gptj_dist.stages.load_progress import LoadProgress
from gptj_dist.stages.loss import StageProcess
from gptj_dist.stages.peer_files import PeerFiles
from gptj_dist.stages.pulse import Pulse
from gptj_dist.stages.request_log import RequestLog
from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.edge import Outbound
from gptj_dist.stages.transport.frames import EndFrame, Frame, PlanFrame, ResultFrame, SwitchFrame
from gptj_dist.stages.transport.leash import watch_post
from gptj_dist.stages.transport.parcels import AbandonedError

if TYPE_CHECKING:
    from gptj_dist.stages.moving import MoveReport

logger = logging.getLogger(__name__)

END_LINGER_MS = 1000

CONCURRENCY_GROUPS = {"run": 1, "progress": 1, "adapters": 1, "moves": 1}
"""For `ray.remote`: calls of the other groups are answered while one of the group `run` runs."""


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """Where a stage is.

    Args:
        address: of its receiving end.
        node_id: Ray's name of its node.
        visible_devices: the GPUs of its process, as in `CUDA_VISIBLE_DEVICES`; None if that is not set.
    """

    device: DeviceReport
    address: str
    process: StageProcess
    node_id: str
    visible_devices: str | None


class Stage:
    """One stage of a pipeline. Call `become`, `load`, `allocate` and `run`; to join the next ring, `leave` and `renew`.

    Before `become` it is a spare: a process that has imported torch and can become any stage.

    Args:
        leash: address of the coordinator's `LeashPost`, with whose loss the process ends; None watches none.
    """

    def __init__(self, leash: str | None = None) -> None:
        if leash is not None:
            watch_post(leash, _end_orphan)
        with garbage.paused():
            import gptj_dist.stages.runner  # noqa: F401  # takes most of the time that a process needs to start

        self._progress = LoadProgress("starting")
        self._is_computing = False
        self._clock = SteadyClock()
        self._requests = RequestLog()
        self._cores: CoreClaim | None = None

    def become(
        self, spec: StageSpec, epoch: int, log: LogSettings | None = None, visible_devices: str | None = None
    ) -> PlacedStage:
        """Takes the place of a stage.

        Args:
            epoch: number of the ring; frames of another one are dropped.
            log: None logs nothing.
            visible_devices: those of the stage whose place a spare takes; None keeps what Ray has set.

        Raises:
            ConfigurationError: the machine does not have the device that the spec names.
        """
        from gptj_dist.stages.moving import StageMover
        from gptj_dist.stages.runner import StageRunner

        if visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices
        log_file = None
        if log is not None:
            log_file = Path(open_log(log_directory(), log, f"stage-{spec.layers.stage}").baseFilename)
        files = None if spec.source is None else PeerFiles(spec.source, stage_address(spec.interface))
        self._runner = StageRunner(spec, files)
        self._wire, self._interface = spec.wire, spec.interface
        self._mover = StageMover(self._runner)
        self._open(epoch)
        return PlacedStage(
            device=self._runner.describe_device(),
            address=self._inbound.address,
            process=StageProcess.this(log_file),
            node_id=ray.get_runtime_context().get_node_id(),
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )

    @ray.method(concurrency_group="run")
    def load(self, dtype: DTypeName, num_threads: int, num_lone_threads: int) -> StageReport:
        """Calls `StageRunner.load` on the computing thread. Claims cores for this stage alone if enough are free.

        Args:
            num_threads, num_lone_threads: maximum number of torch threads of a CPU stage, and in its lone steps.

        Raises:
            CheckpointError: see `StageRunner.load`; the message names this machine.
        """
        claim = self._cores = claim_cores(num_threads)
        lone = LoneCores(num_lone_threads) if claim is None else LoneCores(num_lone_threads, claim.allowed, claim.cores)
        logger.info("stage loads", extra=values(dtype=dtype, threads=num_threads, pid=os.getpid()))

        def note(progress: LoadProgress) -> None:
            self._progress = progress

        try:
            report = self._runner.load(dtype, num_threads, note, lone)
        except CheckpointError as error:  # other machines may have other files
            raise CheckpointError(f"{self._runner.describe_device().host}: {error}") from error
        self._dtype = dtype
        logger.info("stage loaded", extra=values(layers=report.layers.num_layers, device=report.device.name))
        return report

    @ray.method(concurrency_group="progress")
    def progress(self) -> LoadProgress:
        """What `load` is doing. Can be called while `load` runs."""
        return self._progress

    @ray.method(concurrency_group="adapters")
    def load_adapter(self, source: AdapterSource) -> None:
        """Calls `StageRunner.load_adapter`, while `run` runs."""
        self._runner.load_adapter(source)

    @ray.method(concurrency_group="progress")
    def pulse(self) -> Pulse:
        """A sign of life. Can be called while `run` runs."""
        return Pulse(self._runner.num_beats, self._is_computing, self._num_frames)

    @ray.method(concurrency_group="run")
    def allocate(self, num_blocks: int) -> None:
        """Calls `StageRunner.allocate`."""
        self._runner.allocate(num_blocks)
        logger.info("stage ready", extra=values(kv_blocks=num_blocks))

    @ray.method(concurrency_group="run")
    def run(self, next_address: str) -> None:
        """Computes frames until the last one. The call's reference resolves or fails when the stage leaves its ring.

        Raises:
            FrameFaultError: a frame did not arrive as it was sent. The stage can join the next ring.
        """
        outbound = self._transport.outbound(next_address)
        garbage.settle()
        try:
            while not isinstance(frame := self._runner.wait_for(self._inbound.receive), EndFrame):
                if not self._is_leaving:
                    self._num_frames += 1
                    self._is_computing = True
                    if isinstance(frame, SwitchFrame):
                        self._switch(frame, outbound)
                    else:
                        outbound.send(self._compute(frame))
                    self._is_computing = False
            outbound.send(frame)
        finally:
            outbound.close(END_LINGER_MS)

    @ray.method(concurrency_group="progress")
    def leave(self) -> None:
        """Has `run` end after the frame that it computes. A move of a layer is given up."""
        self._is_leaving = True
        self._mover.cancel()
        outbound = self._transport.outbound(self._inbound.address)
        outbound.send(EndFrame())
        outbound.close(END_LINGER_MS)

    @ray.method(concurrency_group="run")
    def renew(self, epoch: int, layers: LayerRange) -> str:
        """Forgets all requests and opens a receiving end for the next ring; returns its address. Begins after `run`.

        Args:
            layers: the stage's in the next ring: those before or after a move of which it was a part.
        """
        self._inbound.close()
        self._runner.reset(layers)
        self._open(epoch)
        return self._inbound.address

    @ray.method(concurrency_group="moves")
    def prepare_move(self, move: LayerMove) -> str:
        """Calls `StageMover.prepare`, while `run` runs."""
        return self._mover.prepare(move, stage_address(self._interface))

    @ray.method(concurrency_group="moves")
    def send_ahead(self, move: LayerMove, address: str) -> None:
        """Calls `StageMover.send_ahead`, while `run` runs."""
        self._mover.send_ahead(move, address)

    @ray.method(concurrency_group="moves")
    def take_ahead(self) -> None:
        """Calls `StageMover.take_ahead`, while `run` runs."""
        self._mover.take_ahead()

    @ray.method(concurrency_group="moves")
    def end_move(self) -> MoveReport:
        """Calls `StageMover.end`, while `run` runs."""
        return self._mover.end()

    @ray.method(concurrency_group="progress")
    def cancel_move(self) -> None:
        """Has the calls above return. Only before the stages switch; `leave` does it later."""
        self._mover.cancel()

    @ray.method(concurrency_group="moves")
    def forget_move(self) -> None:
        """Frees what was prepared for a move that was cancelled."""
        self._mover.forget()

    def _switch(self, frame: SwitchFrame, outbound: Outbound) -> None:
        with suppress(AbandonedError):  # the frame that ends the run follows
            self._mover.switch(frame.move, lambda: outbound.send(frame))

    def _open(self, epoch: int) -> None:
        self._is_leaving = False
        self._num_frames = 0
        self._transport = open_transport(epoch)
        self._inbound = self._transport.inbound(stage_address(self._interface))

    def _compute(self, frame: Frame) -> Frame:
        if not isinstance(frame, PlanFrame):
            raise TypeError(f"a stage received a {type(frame).__name__}, expected a PlanFrame")
        self._requests.note(frame.plan)
        edges = (*frame.edges, self._inbound.traffic)
        from gptj_dist.stages.runner import StageOutput
        from gptj_dist.stages.wire import decode_hidden, encode_hidden

        begin_ns = self._clock()
        before = None
        if frame.hidden is not None:
            before = StageOutput(decode_hidden(frame.hidden, self._dtype), frame.embeddings)
        output = self._runner.step(frame.plan, before)
        hidden = None if isinstance(output, Result) else encode_hidden(output.hidden, self._wire)
        timings = (*frame.timings, StageTiming(begin_ns, self._clock()))  # after the copy that waits for a GPU
        if isinstance(output, Result):
            return ResultFrame(replace(output, timings=timings), edges)
        return PlanFrame(frame.plan, hidden, timings, edges, output.embeddings)


def stage_address(interface: str | None) -> str:
    """The address of this machine at which stages receive.

    Args:
        interface: see `PipelineConfig`.

    Raises:
        ConfigurationError: this machine has no such interface.
    """
    return ray.util.get_node_ip_address() if interface is None else address_of(interface)


def _end_orphan() -> None:
    logger.error("coordinator lost, stage ends")
    os._exit(1)


def log_directory() -> Path:
    """The directory of this node's logs, beside those of Ray."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), "logs", "gptj-dist")
