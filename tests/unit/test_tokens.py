"""Which token is shown to a Ray, and what the user is told where none opens it: against a server like Ray's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.cluster.code import JoinCode, Place
from gptj_dist.operate.cluster.run import open_store
from gptj_dist.operate.launch.tokens import give_token, take_token

Environment = dict[str, str]
Ray = Callable[..., str]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Of a user with an empty home."""
    settings = {"HOME": str(tmp_path)}
    monkeypatch.setattr("os.environ", settings)
    return settings


@pytest.fixture
def ray() -> Iterator[Ray]:
    """Starts a server that answers Ray's call to those with the token, and gives its address."""
    servers = []

    def start(token: str | None, refusal: grpc.StatusCode = grpc.StatusCode.UNAUTHENTICATED) -> str:
        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            shown = dict(context.invocation_metadata()).get("authorization")
            if token is not None and shown != f"Bearer {token}":
                context.abort(refusal, "InvalidAuthToken")
            return b""

        method = grpc.unary_unary_rpc_method_handler(answer)
        handler = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"GetClusterId": method})
        server: Any = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


def keep_user_token(home: Path, token: str) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(f"{token}\n")


def settings_of(environment: Environment) -> Environment:
    return {name: value for name, value in environment.items() if name.startswith("RAY_")}


def test_a_ray_that_starts_here_has_a_token_and_the_users_own_rays_are_left_alone(
    environment: Environment, tmp_path: Path
) -> None:
    give_token()
    assert environment["RAY_AUTH_MODE"] == "token"
    file = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert len(file.read_text()) == 64
    assert file.stat().st_mode & 0o077 == 0
    assert not (tmp_path / ".ray").exists()


def test_the_next_ray_that_starts_here_has_the_same_token(environment: Environment) -> None:
    give_token()
    first = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        del environment[name]
    give_token()
    assert Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text() == first


def test_a_user_without_a_home_to_write_to_still_has_a_token(environment: Environment) -> None:
    environment["HOME"] = "/dev/null"
    give_token()
    assert len(environment["RAY_AUTH_TOKEN"]) == 64


def test_what_the_user_has_set_stays(environment: Environment) -> None:
    environment["RAY_AUTH_MODE"] = "disabled"
    give_token()
    assert settings_of(environment) == {"RAY_AUTH_MODE": "disabled"}


def test_the_users_token_is_used_where_there_is_one(environment: Environment, tmp_path: Path) -> None:
    keep_user_token(tmp_path, "theirs")
    give_token()
    assert settings_of(environment) == {"RAY_AUTH_MODE": "token"}


def test_joining_shows_the_users_token(environment: Environment, tmp_path: Path, ray: Ray) -> None:
    keep_user_token(tmp_path, "theirs")
    take_token(ray("theirs"))
    assert environment["RAY_AUTH_MODE"] == "token"


def test_joining_a_ray_of_our_own_takes_up_its_token(environment: Environment, tmp_path: Path, ray: Ray) -> None:
    give_token()
    ours = Path(environment["RAY_AUTH_TOKEN_PATH"])
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        del environment[name]
    keep_user_token(tmp_path, "theirs")  # the user has got one since
    take_token(ray(ours.read_text()))
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(ours)


def test_a_ray_without_tokens_is_joined_by_those_with_and_without_one(
    environment: Environment, tmp_path: Path, ray: Ray
) -> None:
    address = ray(None)
    take_token(address)
    assert "RAY_AUTH_MODE" not in environment
    keep_user_token(tmp_path, "theirs")
    take_token(address)
    assert "RAY_AUTH_MODE" not in environment, "the processes of that Ray show no token, so this one must ask for none"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("token", "reason"), [(None, "asks for a token"), ("theirs", "does not accept the token")])
def test_a_ray_that_refuses_is_one_line_that_names_the_settings(
    tmp_path: Path, ray: Ray, token: str | None, reason: str
) -> None:
    if token is not None:
        keep_user_token(tmp_path, token)
    with pytest.raises(ConfigurationError, match=rf"{reason}.*auth_token or RAY_AUTH_TOKEN.*RAY_AUTH_MODE"):
        take_token(ray("another"))


@pytest.mark.usefixtures("environment")
def test_what_is_no_ray_is_called_that() -> None:
    with pytest.raises(ConfigurationError, match=r"no Ray answers at 127.0.0.1:1"):
        take_token("127.0.0.1:1")


def code_for(address: str) -> JoinCode:
    host, _, port = address.partition(":")
    return JoinCode.new(Place(host, int(port)))


def told_to_who_joins(address: str) -> str:
    code = code_for(address)
    assert code.place is not None
    with pytest.raises(ConfigurationError) as refused:
        open_store(code.place, code)
    return str(refused.value)


def test_who_joins_with_another_secret_is_told_so(environment: Environment, ray: Ray) -> None:
    address = ray("secret")
    assert told_to_who_joins(address) == (
        f"the cluster at {address} does not accept this code: its secret is another one. Type the code that the "
        "`gptj-dist up` there has printed"
    )
    assert settings_of(environment) == {}


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED], ids=str)
def test_a_head_that_is_too_slow_is_not_said_to_refuse_the_code(
    environment: Environment, ray: Ray, status: grpc.StatusCode
) -> None:
    address = ray("secret", status)
    assert told_to_who_joins(address) == (
        f"no Ray answers at {address}: the head is too busy, or something else listens there. Try again"
    )
    assert settings_of(environment) == {}
