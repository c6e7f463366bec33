"""The address of this machine that others of its cluster reach: of an interface by name, or of the one that is used."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

from gptj_dist.errors import ConfigurationError

ELSEWHERE = "203.0.113.1"
"""An address that no machine has (RFC 5737): the way to it is the default route."""

_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15


def address_of(interface: str | None, towards: str = ELSEWHERE) -> str:
    """An IPv4 address of this machine. Sends nothing.

    Args:
        interface: an interface's name or an address of this machine; None takes the one that leads to `towards`.

    Raises:
        ConfigurationError: there is none.
    """
    if interface is not None:
        return _given(interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # of UDP: only chooses the way
        except OSError as error:
            where = "the default route" if towards == ELSEWHERE else towards
            raise ConfigurationError(
                f"no interface leads to {where} ({error.strerror}); name one by --interface, or `lo` for this machine "
                "alone"
            ) from error
        return str(probe.getsockname()[0])


def _given(interface: str) -> str:
    try:
        address = str(ipaddress.IPv4Address(interface))
    except ValueError:
        return _of_name(interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ConfigurationError(f"--interface: this machine does not have the address {address}") from error
    return address


def _of_name(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            request = struct.pack("256s", name.encode()[:_NAME_BYTES])
            return socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError as error:
            known = ", ".join(known for _, known in socket.if_nameindex())
            raise ConfigurationError(
                f"--interface: no interface {name!r:.40} with an IPv4 address; this machine has {known}"
            ) from error
