"""A Ray of this machine's own is for nobody else: not for other machines, and not for other users of this one."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TOKEN = Path("~/.ray/auth_token")
"""Where Ray keeps its token unless it is told otherwise."""
CONNECT_SECONDS = 5.0


@contextmanager
def on_localhost() -> Iterator[None]:
    """Lets a Ray that is started meanwhile take 127.0.0.1 as its address; then all its processes listen there alone.

    By itself Ray does so where it makes no clusters (macOS, Windows); elsewhere it turns even
    `_node_ip_address="127.0.0.1"` into the address by which other machines reach this one.
    """
    from ray._private import ray_constants

    kept, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


def listens_here_alone(address: str) -> bool:
    """Whether the Ray at `host:port` is one of this machine's own (`on_localhost`), to be joined in the same way.

    Ray would look for it at the address by which other machines reach this one, where it does not listen.
    """
    from ray._private.services import get_node_ip_address

    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdecimal():
        return False
    try:
        socket.create_connection((get_node_ip_address(), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError:
        return True
    return False


def keep_token() -> None:
    """Makes the file of Ray's token where there is none, and closes it to others; Ray makes it as the umask says.

    Where it cannot be written the token is this session's alone, in the environment of its processes.
    """
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        path = TOKEN.expanduser()
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileExistsError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(file, secrets.token_hex(32).encode())
            os.close(file)
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except (OSError, RuntimeError):  # RuntimeError: nothing says where the home is
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
