"""Opens and tries TCP addresses. Stdlib only."""

from __future__ import annotations

import ipaddress
import socket


def listen_at(host: str, port: int) -> socket.socket:
    """Opens a socket that listens at the address. Raises OSError."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def why_not_listen(host: str, port: int) -> str | None:
    """The reason why a server cannot listen at the address, or None if it can."""
    try:
        listen_at(host, port).close()
    except OSError as error:
        return f"cannot listen at {host}:{port}: {error.strerror}"
    except OverflowError:
        return f"cannot listen at {host}:{port}: ports go up to 65535"
    except (UnicodeError, TypeError):
        return f"cannot listen at {host}:{port}: not a valid host name"
    return None


def why_not_reach(host: str, port: int, timeout_s: float) -> str | None:
    """The reason why a connection fails, or None if it succeeds."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return str(error.strerror or error)
    except OverflowError:
        return "ports go up to 65535"
    except (UnicodeError, TypeError):
        return "not a valid host name"
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
