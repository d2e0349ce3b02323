"""The one door for what servers say: bounded in size, time and depth, JSON, and without the key that they were sent.

Nothing of a reply is stored, logged or raised before it has come through here.
"""

import asyncio
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaray.text import Cleaner
from deltaray.text.depth import MOST_DEPTH, is_too_deep
from deltaray.text.screen import one_line

MOST_BYTES = 8 << 20
"""Of one reply, unpacked."""
WORDS = 500
"""Characters kept of what a server says besides its answer: some answer with a whole page."""
CONNECT_SECONDS = 30.0
NO_KEY = "EMPTY"
"""Sent to models where there is no key: some servers refuse a request without any."""
_PACKED = ("gzip", "x-gzip", "deflate")


class NoReplyError(Exception):
    """No reply that can be read. The message is fit to be shown."""

    def __init__(self, words: str, again: bool = True, unreachable: bool = False, unusable: bool = False) -> None:
        """What is known of it.

        Args:
            again: the next try may succeed.
            unreachable: nobody answers at the address.
            unusable: something came, but no JSON, or too much.
        """
        super().__init__(words)
        self.again, self.unreachable, self.unusable = again, unreachable, unusable


@dataclass(frozen=True)
class Reply:
    """What a server said, cleaned."""

    status: int
    headers: Mapping[str, str]
    body: Any
    """The parsed JSON; None if there is none, which only an error's reply may lack."""
    text: str
    """The beginning of an error's reply that is not JSON, else empty."""


class Server:
    """Asks one address; redirects are not followed, so that neither prompts nor keys go anywhere else."""

    def __init__(self, url: str, timeout: float, key: str | None = None, kept_alive: int = 1) -> None:
        """A client for one address.

        Args:
            timeout: seconds for all of one request.
            key: goes with every request and is taken out of what comes back. One that is too short to be told from
                words (`forms.SHORTEST`) is taken out of errors, but stays in answers.
            kept_alive: connections that are kept for the next request.
        """
        import httpx2

        for name in ("httpx2", "httpcore2"):  # at level DEBUG they log headers, which may quote the key
            logging.getLogger(name).setLevel(logging.WARNING)
        self.url, self.timeout = httpx2.URL(url), timeout
        secrets = [key] if key and key != NO_KEY else []
        self._of_answers, self._of_errors = Cleaner(secrets), Cleaner(secrets, short=True)
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "deltaray"}
        self._headers |= {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=kept_alive),
        )

    async def ask(self, body: Mapping[str, Any], any_type: bool = False) -> Reply:
        """Posts JSON.

        Args:
            any_type: take JSON for what it is whatever the server calls it.
        Raises:
            NoReplyError: there is no reply, or it is too large, too slow or no JSON.
        """
        import httpx2

        content = json.dumps(body, allow_nan=False).encode()
        try:
            async with (
                asyncio.timeout(self.timeout),  # the client's own is per read, not for all of it
                self._client.stream("POST", self.url, content=content, headers=self._headers) as response,
            ):
                raw = await _read(response)
            return self._reply(response, raw, any_type)
        except TimeoutError:
            words, unreachable = "the server took longer than `timeout` allows", False
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            words, unreachable = f"Connection error: {error or type(error).__name__}", True
        except (httpx2.HTTPError, httpx2.InvalidURL, zlib.error) as error:
            words, unreachable = f"the connection broke off: {type(error).__name__} {error}", False
        raise NoReplyError(self.shown(words), unreachable=unreachable)  # outside of `except`: those hold the request

    async def close(self) -> None:
        await self._client.aclose()

    def _reply(self, response: Any, raw: bytes, any_type: bool) -> Reply:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        body, text, failed = None, "", response.status_code >= 300
        try:
            if kind and not kind.endswith("json") and not (any_type or failed):
                raise ValueError(f"it is {kind}")
            body = (self._of_errors if failed else self._of_answers).clean_all(parsed(raw))
        except ValueError as error:
            text = self.shown(raw[: 64 * WORDS].decode(errors="replace"))
            if not failed:
                raise NoReplyError(self.shown(f"unusable answer: no JSON ({error}): {text}"), unusable=True) from None
        headers = {name: self._of_errors.clean(value) for name, value in response.headers.items()}
        return Reply(response.status_code, headers, body, text or self.shown(response.reason_phrase))

    def shown(self, words: str) -> str:
        """What the server, or its client, says besides answers, fit for a message, a log and a table."""
        return one_line(self._of_errors.clean(words))[:WORDS]


def parsed(raw: bytes) -> Any:
    """The JSON of a reply. Pure.

    Raises:
        ValueError: it is none, holds numbers that are none, or is nested deeper than `MOST_DEPTH`.
    """
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels") from None
    if is_too_deep(value):
        raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


async def _read(response: Any) -> bytes:
    """The reply as it comes, unpacked where it is packed though nobody asked for it.

    Raises:
        NoReplyError: it is larger than `MOST_BYTES`, which is found out without reading on.
    """
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in ("", "identity", *_PACKED):
        raise NoReplyError(
            f"unusable answer: packed as {one_line(packing)[:40]!r}, which was not asked for", unusable=True
        )
    unpack, found = zlib.decompressobj(wbits=47) if packing in _PACKED else None, bytearray()
    async for piece in response.aiter_raw():
        found += unpack.decompress(piece, MOST_BYTES + 1 - len(found)) if unpack else piece
        if len(found) > MOST_BYTES:
            if response.status_code >= 300:
                break  # the beginning of an error's page is enough
            raise NoReplyError(f"the answer is larger than {MOST_BYTES >> 20} MiB", again=False, unusable=True)
    return bytes(found)


def is_address(url: str) -> bool:
    """Whether a server can be asked there. Pure."""
    import httpx2

    try:
        parts = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        return False
    return parts.scheme in ("http", "https") and bool(parts.host)


def below(url: str, path: str) -> str:
    """An address below another; a query stays at its end. Pure."""
    import httpx2

    base = httpx2.URL(url)
    return str(base.copy_with(path=f"{base.path.rstrip('/')}/{path}"))
