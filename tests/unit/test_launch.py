"""Whom `gptj-dist serve` lets in, decided before anything starts."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from typer.testing import CliRunner

from gptj_dist.answers.request_limits import KEEP_ALIVE_S
from gptj_dist.cli import app
from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.launch.settings import Launch
from gptj_dist.serving.keys import find_key
from gptj_dist.serving.sockets import why_not_listen

Serve = Callable[..., Launch]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """What the command would launch."""
    launches: list[Launch] = []
    monkeypatch.setattr("gptj_dist.operate.launch.run.start_signals", lambda: None)
    monkeypatch.setattr("gptj_dist.operate.launch.run.run_until_stopped", lambda launch, _: launches.append(launch))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("GPTJ_API_KEY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def run(*options: str) -> Launch:
        result = CliRunner().invoke(app, ["serve", "demo", *options])
        if result.exception is not None:
            raise result.exception
        return launches.pop()

    return run


def write_certificate(directory: Path, name: str) -> tuple[str, str]:
    """A certificate for this machine and its private key: their files."""
    certificate = trustme.CA().issue_cert("localhost", "127.0.0.1")
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    certificate.cert_chain_pems[0].write_to_path(cert)
    certificate.private_key_pem.write_to_path(key)
    return str(cert), str(key)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "fe80::1", "gptj.example.org"])
def test_an_open_address_needs_a_key_or_the_word_insecure(serve: Serve, host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no API key: give --api-key .* or --insecure"):
        serve("--host", host)
    assert serve("--host", host, "--insecure").app.api_keys == ()
    assert serve("--host", host, "--api-key", "s3cret").listen.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_on_loopback_nobody_needs_a_key(serve: Serve, host: str) -> None:
    assert serve("--host", host).app.api_keys == ()


def test_the_key_of_the_environment_opens_and_is_kept_nowhere(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "GPTJ_API_KEY", "s3cret")
    launch = serve("--host", "0.0.0.0")
    assert find_key(launch.app.api_keys, "s3cret") is not None
    assert find_key(launch.app.api_keys, "another") is None
    assert "s3cret" not in repr(launch)


def test_the_launcher_has_a_key_of_its_own(serve: Serve) -> None:
    launch = serve("--api-key", "s3cret")
    assert launch.api_key is not None
    assert launch.api_key != "s3cret"
    assert find_key(launch.app.api_keys, launch.api_key) is not None


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "tab\t"])
def test_a_key_that_no_header_can_hold_is_refused(serve: Serve, key: str) -> None:
    with pytest.raises(ConfigurationError, match="without spaces"):
        serve("--api-key", key)


def test_idle_connections_are_kept_for_as_long_as_the_option_says(serve: Serve) -> None:
    assert serve().listen.keep_alive_s == KEEP_ALIVE_S
    assert serve("--keep-alive-s", "9").listen.keep_alive_s == 9


def test_a_certificate_and_its_key_belong_together(serve: Serve, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, "one")
    _, other_key = write_certificate(tmp_path, "other")
    launch = serve("--tls-cert", cert, "--tls-key", key)
    assert (launch.listen.tls_cert, launch.listen.tls_key) == (cert, key)
    for options in (["--tls-cert", cert], ["--tls-key", key]):
        with pytest.raises(ConfigurationError, match="belong together"):
            serve(*options)
    for files in ((cert, other_key), (key, cert), (cert, str(tmp_path / "none"))):
        with pytest.raises(ConfigurationError, match="cannot be used for TLS"):
            serve("--tls-cert", files[0], "--tls-key", files[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--route-prefix", "/b"], "several models on one cluster"),
        (["--route-prefix", "b", "--address", "127.0.0.1:1"], "must begin with a slash"),
    ],
)
def test_a_route_prefix_is_for_clusters(serve: Serve, options: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        serve(*options)


def test_serves_proxies_know_no_tls(serve: Serve, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, "one")
    with pytest.raises(ConfigurationError, match="they know no TLS"):
        serve("--address", "127.0.0.1:1", "--tls-cert", cert, "--tls-key", key)


def test_addresses_of_ipv6_are_tried_out_too() -> None:
    try:
        other = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with other:
        reason = why_not_listen("::1", other.getsockname()[1])
    assert reason is not None
    assert "in use" in reason
    assert why_not_listen("::1", 0) is None
