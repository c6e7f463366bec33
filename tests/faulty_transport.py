"""A transport that does to its messages what broken networks do, after they were numbered and sealed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.edge import AsyncInbound, Inbound, Outbound
from gptj_dist.stages.transport.zeromq import ZeroMQOutbound

Message = list[bytes]
Fault = Callable[[list[Message]], list[Message]]
"""Which messages leave in place of the newest one. It is given all of the edge in all epochs, the newest last."""


def lose(_: list[Message]) -> list[Message]:
    return []


def send_late(sent: list[Message]) -> list[Message]:
    """The message before, which was lost, arrives after all."""
    return [sent[-1], sent[-2]]


def double(sent: list[Message]) -> list[Message]:
    return [sent[-1], sent[-1]]


def corrupt_header(sent: list[Message]) -> list[Message]:
    header, *data = sent[-1]
    middle = len(header) // 2
    return [[header[:middle] + b"\x00\xff\x00" + header[middle + 3 :], *data]]


def corrupt_hidden_states(sent: list[Message]) -> list[Message]:
    """Swaps two bytes of the last part, which is the header where there are no hidden states."""
    *rest, last = sent[-1]
    place = next(index for index in range(4, len(last) - 1) if last[index] != last[index + 1])
    return [[*rest, last[:place] + last[place : place + 2][::-1] + last[place + 2 :]]]


def flip_bit(sent: list[Message]) -> list[Message]:
    *rest, last = sent[-1]
    return [[*rest, last[:-1] + bytes([last[-1] ^ 1])]]


def cut_off(sent: list[Message]) -> list[Message]:
    *rest, last = sent[-1]
    return [[*rest, last[:-1]]]


def replay_stale(sent: list[Message]) -> list[Message]:
    """A message of an older epoch arrives again."""
    return [sent[0], sent[-1]]


@dataclass(slots=True)
class FaultyNetwork:
    """Decides what happens to messages.

    Args:
        faults: in the order in which they happen: the edge, the number of the message on it in its epoch, the fault.

    Attributes:
        sent: all messages so far, by edge.
    """

    faults: list[tuple[int, int, Fault]] = field(default_factory=list)
    sent: dict[int, list[Message]] = field(default_factory=dict)

    def passed(self, edge: int, number: int, message: Message) -> list[Message]:
        """What arrives instead of the message."""
        sent = self.sent.setdefault(edge, [])
        sent.append(message)
        if self.faults and self.faults[0][:2] == (edge, number):
            _, _, fault = self.faults.pop(0)
            return fault(sent)
        return [message]


class FaultySocket:
    """Sends over a real socket what the network lets through."""

    def __init__(self, socket: Any, network: FaultyNetwork, edge: int) -> None:
        self._socket = socket
        self._network = network
        self._edge = edge
        self._num_messages = 0

    def send_multipart(self, parts: Sequence[bytes | memoryview], flags: int) -> None:
        message = [bytes(part) for part in parts]
        for passed in self._network.passed(self._edge, self._num_messages, message):
            self._socket.send_multipart(passed, flags=flags)
        self._num_messages += 1

    def close(self, linger: int) -> None:
        self._socket.close(linger=linger)


@dataclass(frozen=True, slots=True)
class FaultyTransport:
    """Implements `edge.Transport` over the real one.

    Args:
        edge: the edge of all its sending ends.
    """

    epoch: int
    network: FaultyNetwork
    edge: int

    def inbound(self, host: str) -> Inbound:
        return open_transport(self.epoch).inbound(host)

    def async_inbound(self, host: str) -> AsyncInbound:
        return open_transport(self.epoch).async_inbound(host)

    def outbound(self, address: str) -> Outbound:
        outbound = ZeroMQOutbound(address, self.epoch)
        outbound._socket = cast(Any, FaultySocket(outbound._socket, self.network, self.edge))
        return outbound
