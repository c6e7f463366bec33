"""Authentication tokens of Ray: for a Ray that the launcher starts, and for a Ray that runs already.

Ray takes a token from RAY_AUTH_TOKEN, from the file that RAY_AUTH_TOKEN_PATH names or from ~/.ray/auth_token. If the
user has none, we keep our own beside our other files. Ray would write one to ~/.ray/auth_token, and from then on every
`ray start` of the user would require it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path

from gptj_dist.errors import ConfigurationError

AUTH_MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
PROBE_TIMEOUT_S = 10.0

_PROBE = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""A call that every Ray answers, or refuses for want of a token."""


def give_token() -> None:
    """Makes a Ray that this process starts require a token, unless RAY_AUTH_MODE is set."""
    if AUTH_MODE in os.environ:
        return
    os.environ[AUTH_MODE] = "token"
    if _user_token() is not None:
        return
    path = _own_file()
    if path is not None and _write_token(path):
        os.environ[TOKEN_FILE] = str(path)
    else:  # there is no home to write to: only this Ray's own processes have the token
        os.environ[TOKEN] = secrets.token_hex(32)


def use_token(address: str, token: str) -> None:
    """Makes this process, and the Ray that it starts, show a token. Other commands of this user find it, too.

    Args:
        address: of the cluster, `host:port`, under which the token is kept.
    """
    os.environ[AUTH_MODE] = "token"
    path = _cluster_file(address)
    if path is not None and _replace_token(path, token):
        os.environ[TOKEN_FILE] = str(path)
        os.environ.pop(TOKEN, None)
    else:
        os.environ[TOKEN] = token


def take_token(address: str) -> None:
    """Finds the token that the Ray at the address accepts, if it requires one, and makes this process send it.

    Args:
        address: `host:port`.

    Raises:
        ConfigurationError: no Ray answers there, or it accepts no token that this user has.
    """
    problem = ""
    for token, settings in _known_tokens(address):
        problem = why_refused(address, token)
        if not problem:
            os.environ.update(settings)
            return
    raise ConfigurationError(problem)


def _known_tokens(address: str) -> Iterator[tuple[str | None, Mapping[str, str]]]:
    """Tokens to try, and the settings by which Ray shows each; None is no token.

    None comes first. A Ray without authentication accepts any token, but the processes of that Ray have none, and a
    process that shows one refuses their calls.
    """
    user_token = _user_token()
    if AUTH_MODE in os.environ:
        yield (user_token if os.environ[AUTH_MODE].lower() == "token" else None), {}
        return
    yield None, {}
    if user_token is not None:
        yield user_token, {AUTH_MODE: "token"}
    for file in (_cluster_file(address), _own_file()):
        if file is not None and (own_token := _read(file)) is not None:
            yield own_token, {AUTH_MODE: "token", TOKEN_FILE: str(file)}


class Reply(Enum):
    """What a Ray says to a token."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    SILENT = "silent"
    """There is no Ray, or it is too busy to answer."""


def why_refused(address: str, token: str | None) -> str:
    """Why the Ray at the address refuses this process; empty if it accepts it."""
    match ask(address, token):
        case Reply.REFUSED:
            return _refusal(address, token)
        case Reply.SILENT:
            return f"no Ray answers at {address}; its address is the one that `ray start --head` prints"
        case Reply.ACCEPTED:
            return ""


def ask(address: str, token: str | None) -> Reply:
    """Shows a token to the Ray at the address; None shows none."""
    import grpc

    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_PROBE)(b"", timeout=PROBE_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return Reply.REFUSED
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return Reply.SILENT
    return Reply.ACCEPTED


def _refusal(address: str, token: str | None) -> str:
    what = "does not accept the token of this machine" if token else "asks for a token, and this machine has none"
    return (
        f"the Ray at {address} {what}: put what `ray get-auth-token` prints on its head node into ~/.ray/auth_token or "
        "RAY_AUTH_TOKEN here, and leave RAY_AUTH_MODE unset or set it to token (RAY_AUTH_MODE=disabled on every node "
        "turns tokens off)"
    )


def _user_token() -> str | None:
    """The token that Ray finds by itself."""
    if token := os.environ.get(TOKEN):
        return token
    with suppress(RuntimeError):  # this user has no home
        return _read(Path(os.environ.get(TOKEN_FILE) or Path.home() / ".ray" / "auth_token"))
    return None


def _own_file() -> Path | None:
    return _cached("ray-token")


def _cluster_file(address: str) -> Path | None:
    """The token of a cluster that this machine has joined."""
    return _cached(f"ray-token-{address}")


def _cached(name: str) -> Path | None:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptj-dist" / name
    except RuntimeError:  # this user has no home
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _write_token(path: Path) -> bool:
    """Writes a new token if the file does not exist. Returns whether the file exists now."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            with suppress(FileExistsError):  # another launcher was quicker
                path.hardlink_to(draft)
            draft.unlink()
    except OSError:
        return False
    return _read(path) is not None


def _replace_token(path: Path, token: str) -> bool:
    """Writes the token in place of another one. Returns whether that was possible."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(token)
        draft.replace(path)
    except OSError:
        return False
    return True
