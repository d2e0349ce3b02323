"""The job server of a cluster: connecting to it, and its refusals in our words."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaray.errors import StageError, UserError
from deltaray.failures import cause_of

ADDRESS = "RAY_API_SERVER_ADDRESS"
TOKEN_PLACES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
DEFAULT_TOKEN = Path("~/.ray/auth_token")
NO_TOKEN = (
    "write the cluster's token into a file that only you can read and name it in RAY_AUTH_TOKEN_PATH "
    "(or keep it in ~/.ray/auth_token)"
)


def connect(address: str | None) -> Any:
    """A `JobSubmissionClient`.

    Args:
        address: `http://HEAD:8265`; None: what RAY_API_SERVER_ADDRESS says.
    Raises:
        UserError: no address, no answer there, or the token is missing or wrong.
    """
    address = address or os.environ.get(ADDRESS)
    if not address or not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address or ''}: give the job server, such as http://127.0.0.1:8265 (or {ADDRESS})")
    os.environ[ADDRESS] = address  # Ray lets its environment overrule what it is told
    if any(name in os.environ for name in TOKEN_PLACES) or DEFAULT_TOKEN.expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads the token only when told to
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # it tells of every upload
    with in_our_words(address):
        return JobSubmissionClient(address)


@contextmanager
def in_our_words(address: str) -> Iterator[None]:
    """Turns the client's failures into one message each."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        wrong = "Authentication failed" in str(error)  # else: required
        said = "the cluster refuses this token" if wrong else "the cluster asks for a token, and none is set here"
        raise UserError(f"--address {address}: {said}; {NO_TOKEN}") from None
    except requests.exceptions.ConnectionError as error:  # after the first answer
        raise StageError(f"--address {address}: the job server broke off: {error}; try again") from None
    except (ConnectionError, requests.exceptions.InvalidURL):
        raise UserError(
            f"--address {address}: no job server answers there; start the cluster, or forward its port (`kubectl "
            "port-forward`, `ray dashboard`, `ssh -L 8265:localhost:8265`)"
        ) from None
    except (requests.exceptions.RequestException, RuntimeError) as error:
        raise StageError(f"--address {address}: the job server failed: {cause_of(error)}") from None
