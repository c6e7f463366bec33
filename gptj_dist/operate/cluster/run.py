"""`up` and `join` in the foreground: a node of Ray from its start until it leaves."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console

import gptj_dist
from gptj_dist.errors import ConfigurationError, StageFailedError, one_line
from gptj_dist.interfaces import address_of
from gptj_dist.operate.cluster.beacon import Beacon, discover
from gptj_dist.operate.cluster.code import JoinCode, Place
from gptj_dist.operate.cluster.membership import Membership
from gptj_dist.operate.cluster.ray_node import NodeOptions, NodeStart, RayNode
from gptj_dist.operate.cluster.store import ClusterStore, NodeState
from gptj_dist.operate.launch.processes import command_lines, descendants
from gptj_dist.operate.launch.signals import StopSignals
from gptj_dist.operate.launch.terminal import open_console, say_last
from gptj_dist.operate.launch.tokens import Reply, ask, use_token
from gptj_dist.serving.sockets import is_loopback, why_not_listen, why_not_reach
from gptj_dist.sizes import bytes_text

DEFAULT_PORT = 6379
DIAL_TIMEOUT_S = 5.0
LOOK_PERIOD_S = 1.0
REGISTER_LIMIT_S = 60.0

_MOVABLE = ("ray::gptj-dist:", "ray::ServeReplica:", "ray::ProxyActor")
"""Beginnings of the titles of processes that the cluster moves away from a node that leaves, or ends when their
requests are answered. Serve's proxy stays for half a minute at least, so that a load balancer may notice."""


@dataclass(frozen=True, slots=True)
class Offer:
    """How a machine takes part.

    Args:
        interface: of its address in the cluster; None takes the one that leads to the other machines.
        num_cpus, num_gpus: what it offers; None offers all.
        drain_s: how long it waits, when it leaves, for stages to move away and for the last answers.
    """

    interface: str | None
    num_cpus: int | None
    num_gpus: int | None
    drain_s: float


def start_signals() -> StopSignals:
    """Receives signals from now on. Call before anything that may start a thread."""
    signals = StopSignals(lambda: say_last("Ended."))
    signals.start()
    return signals


def run_head(offer: Offer, port: int | None, is_discoverable: bool, signals: StopSignals) -> None:
    """Starts a cluster, prints its join code, and stays until it is stopped. The cluster ends with it.

    Args:
        port: of the GCS; None takes 6379, or a free one if that is taken.
        is_discoverable: answers `join --discover`.

    Raises:
        ConfigurationError: there is no such interface, the port is taken, or Ray does not start.
        StageFailedError: a process of Ray's has ended.
    """
    console = open_console()
    host = address_of(offer.interface)
    place = Place(host, _port_to_use(host, port))
    code = JoinCode.new(place)
    beacon = None
    if is_discoverable:
        try:
            beacon = Beacon(place, code.probe_key)
        except OSError as error:
            raise ConfigurationError(f"--discover: the UDP port of the beacon is taken: {error.strerror}") from error
    console.print(f"Starting the cluster's head at {place} ...")
    node = _start_node(NodeOptions(host, str(place), code.ray_token, offer.num_cpus, offer.num_gpus), True, signals)
    try:
        store = ClusterStore(str(place))
        store.write_versions(versions())
        membership = _enter(store, node, host, code)
        num_cpus = store.nodes()[node.node_id].resources.get("CPU", 0.0)
        _print_invitation(console, code, is_discoverable, int(num_cpus))
        signals.let_finish()
        stay = _Stay(console, store, node, membership)
        stay.until(signals.requested.is_set)
        stay.raise_if_lost()
        console.print("The cluster ends. Nodes that joined it end, too.")
    finally:
        if beacon is not None:
            beacon.close()
        node.stop()
    console.print("Stopped.")


def run_member(code: JoinCode, offer: Offer, signals: StopSignals) -> None:
    """Joins a cluster and stays until it is stopped, drained or told to leave; then lets stages move away, and leaves.

    Args:
        code: without a place, the local network is asked for it.

    Raises:
        ConfigurationError: no head answers, the secret or a version is another one, or Ray does not start.
        StageFailedError: a process of Ray's has ended, as it does when the head is gone.
    """
    console = open_console()
    if code.place is None:
        console.print("Looking for the cluster in this network ...")
    place = code.place or discover(code.probe_key)
    host = address_of(offer.interface, towards=place.host)
    console.print(f"Joining {place} from {host} ...")
    store = open_store(place, code)
    node = _start_node(NodeOptions(host, str(place), code.ray_token, offer.num_cpus, offer.num_gpus), False, signals)
    try:
        membership = _enter(store, node, host, code)
        for device in membership.member.devices:
            console.print(f"  {device}", soft_wrap=True)
        console.print("Links, measured now (one way; rate of a long message):")
        membership.measure_all(lambda line: console.print(line, soft_wrap=True))
        console.print(f"Joined as {membership.member.name} ({host}). Ctrl-C leaves.")
        signals.let_finish()
        stay = _Stay(console, store, node, membership)
        stay.until(lambda: signals.requested.is_set() or stay.is_draining)
        stay.raise_if_lost()
        if not stay.is_silent:
            _leave(console, store, node, membership, offer.drain_s)
    finally:
        node.stop()
    console.print("Left the cluster.")


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    import ray

    return {"Python": platform.python_version(), "Ray": ray.__version__, "gptj-dist": gptj_dist.__version__}


def require_versions(of_head: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ConfigurationError if a version differs. Of Python the first two numbers count: Ray's pickles need those.

    Args:
        of_head: as `versions`, of the head.
    """

    def counts(name: str, version: str | None) -> str:
        return ".".join((version or "none").split(".")[:2]) if name == "Python" else version or "none"

    different = [name for name in here if counts(name, of_head.get(name)) != counts(name, here[name])]
    if different:
        named = ", ".join(f"{name} {of_head.get(name, 'unknown')} there and {here[name]} here" for name in different)
        raise ConfigurationError(f"this machine and the cluster's head have different versions: {named}")


class _Stay:
    """A node's time in the cluster."""

    def __init__(self, console: Console, store: ClusterStore, node: RayNode, membership: Membership) -> None:
        self._console, self._store, self._node, self._membership = console, store, node, membership
        self._known: Mapping[str, NodeState] = store.nodes()
        self._lost: str | None = None
        self.is_draining = False
        self.is_silent = False

    def until(self, is_over: Callable[[], bool]) -> None:
        """Looks around once a second, until it is over or Ray has ended."""
        while not is_over() and self._lost is None:
            time.sleep(LOOK_PERIOD_S)
            self._lost = self._node.lost_process()
            if self._lost is not None and self._has_ended_as_told():
                self._lost, self.is_draining = None, True
            try:
                self._look()
                self.is_silent = False
            except Exception as error:  # of any kind that Ray has for a head that does not answer
                if not self.is_silent and self._lost is None:
                    self._console.print(f"The head does not answer ({one_line(error):.100}). Waiting ...")
                self.is_silent = True

    def raise_if_lost(self) -> None:
        """Raises StageFailedError if a process of Ray's has ended."""
        if self._lost is not None:
            why = "the head is gone, or the network to it" if self.is_silent else f"see {self._node.logs}"
            raise StageFailedError(f"Ray's process {self._lost} has ended: {why}")

    def _has_ended_as_told(self) -> bool:
        """Whether this node was drained: an idle one ends at once."""
        try:
            return self._store.has_ended_as_told(self._membership.member.node_id)
        except Exception:  # the head does not answer
            return False

    def _look(self) -> None:
        nodes = self._store.nodes()
        for node_id in nodes.keys() - self._known.keys():
            self._console.print(f"{_name(nodes[node_id])} has joined.")
        for node_id in self._known.keys() - nodes.keys():
            self._console.print(f"{_name(self._known[node_id])} is gone.")
        self._known = nodes
        own = nodes.get(self._membership.member.node_id)
        self.is_draining |= own is not None and own.is_draining
        self._membership.look()


def _name(node: NodeState) -> str:
    return f"{node.name} ({node.address})"


def _port_to_use(host: str, port: int | None) -> int:
    if port is not None:
        if reason := why_not_listen(host, port):
            raise ConfigurationError(f"{reason}; choose another --port")
        return port
    if why_not_listen(host, DEFAULT_PORT) is None:
        return DEFAULT_PORT
    with socket.create_server((host, 0)) as free:
        found: int = free.getsockname()[1]
        return found


def open_store(place: Place, code: JoinCode) -> ClusterStore:
    """The cluster's records, when it has been checked that this machine may join.

    Raises:
        ConfigurationError: see `run_member`.
    """
    if reason := why_not_reach(place.host, place.port, DIAL_TIMEOUT_S):
        raise ConfigurationError(f"no cluster answers at {place}: {reason}")
    match ask(str(place), code.ray_token):
        case Reply.REFUSED:
            raise ConfigurationError(
                f"the cluster at {place} does not accept this code: its secret is another one. Type the code that the "
                "`gptj-dist up` there has printed"
            )
        case Reply.SILENT:
            raise ConfigurationError(
                f"no Ray answers at {place}: the head is too busy, or something else listens there. Try again"
            )
    use_token(str(place), code.ray_token)  # only now: a wrong one would take the place of the right one
    store = ClusterStore(str(place))
    of_head = store.versions()
    if of_head is None:
        raise ConfigurationError(f"the Ray at {place} was not started by `gptj-dist up`")
    require_versions(of_head, versions())
    return store


def _enter(store: ClusterStore, node: RayNode, host: str, code: JoinCode) -> Membership:
    deadline_s = time.monotonic() + REGISTER_LIMIT_S
    while node.node_id not in store.nodes():
        if (process := node.lost_process()) is not None or time.monotonic() > deadline_s:
            raise ConfigurationError(
                f"the node did not register with the cluster ({process or 'raylet'}): see {node.logs}"
            )
        time.sleep(LOOK_PERIOD_S / 10)
    name = socket.gethostname()
    return Membership.enter(store, node.node_id, name, host, os.getpid(), devices_here(), code.probe_key)


def devices_here() -> tuple[str, ...]:
    """This machine's devices, for people."""
    from gptj_dist.operate.doctor.facts import gather_facts

    facts = gather_facts(None, None)
    found = [
        f"{device.kind}: {device.report.name}, "
        + (f"{facts.num_cpus:g} cores, " if device.kind == "cpu" else "")
        + f"{bytes_text(device.report.total_bytes)}, {bytes_text(device.free_bytes)} free"
        for device in facts.devices
    ]
    return tuple(found or [f"no device: {facts.torch_error}"])


def _print_invitation(console: Console, code: JoinCode, is_discoverable: bool, num_cpus: int) -> None:
    assert code.place is not None
    console.print(f"\nThe cluster is up. On each further machine:\n\n  gptj-dist join {code}\n", soft_wrap=True)
    if is_discoverable:
        console.print(f"or, in this network:\n\n  gptj-dist join --discover {code.without_place}\n", soft_wrap=True)
    spread = f"--stages 2 --cpus-per-stage {num_cpus // 2 + 1} --wait-nodes 2"  # more than half: one stage a machine
    console.print(f"Then, here:\n\n  gptj-dist serve demo --address auto {spread}\n", soft_wrap=True)
    console.print("The code is the cluster's secret: who has it can run code on all nodes.")
    if not is_loopback(code.place.host):
        console.print(
            "Ray's ports listen on all interfaces of this machine, and ask for the secret. Keep them behind a "
            "firewall: docs/security.md.",
            soft_wrap=True,
        )
    console.print("Ctrl-C ends the cluster.")


def _leave(console: Console, store: ClusterStore, node: RayNode, membership: Membership, drain_s: float) -> None:
    """Lets stages move to other nodes, and removes this node from the store. A silent head keeps nobody."""
    try:
        wait_to_leave(store, node, drain_s, _num_movable, lambda line: console.print(line, soft_wrap=True))
        membership.leave()
    except Exception as error:  # of any kind that Ray has for a head that does not answer
        console.print(f"The head does not answer ({one_line(error):.100}): leaving at once.", soft_wrap=True)


def wait_to_leave(
    store: ClusterStore, node: RayNode, drain_s: float, num_movable: Callable[[], int], say: Callable[[str], None]
) -> None:
    """Drains this node unless it drains already, and waits until nothing of a server runs on it or its time is over.

    Returns at once if Ray ends here. Raises an error of Ray's if the head does not answer.

    Args:
        drain_s: its time. A node that drains already keeps its own: a later call of Ray's would replace it.
        num_movable: gives the number of processes that have to move or to finish their requests.
        say: receives lines for people.
    """
    own = store.nodes().get(node.node_id)
    if own is not None and not own.is_draining:
        store.drain(node.node_id, "the node leaves", drain_s)
    num_said = 0
    while (num_left := num_movable()) and node.lost_process() is None:
        own = store.nodes().get(node.node_id)
        if own is None:
            return
        if time.time() >= own.ends_at:
            say(f"{num_left} processes had not moved or finished; answers that were not complete are cut.")
            return
        if num_left != num_said:
            say(
                f"{num_left} processes of a server move to other nodes or finish their requests. "
                "A second Ctrl-C leaves at once."
            )
            num_said = num_left
        time.sleep(LOOK_PERIOD_S / 4)


def _num_movable() -> int:
    lines = command_lines()
    return sum(lines.get(child, [""])[0].startswith(_MOVABLE) for child in descendants(os.getpid()))


def _start_node(options: NodeOptions, is_head: bool, signals: StopSignals) -> RayNode:
    """From now on a signal that ends this process at once ends the node's processes, too, complete or not."""
    start = NodeStart()

    def clean_up() -> None:
        say_last("Ended.")
        start.abandon(is_session_kept=signals.can_finish)

    signals.clean_up = clean_up
    return RayNode.start(start, options, is_head)
