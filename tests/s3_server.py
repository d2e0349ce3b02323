"""An S3 server (moto's) in a thread, with a gate in front of it that can hold or refuse a request."""

import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

WAIT = 60.0
"""Seconds that a test waits for a request, and a held request for its release."""
DENIED = b"<Error><Code>AccessDenied</Code><Message>refused by the test</Message></Error>"
BUSY = {
    "503 Slow Down": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    "500 Internal Server Error": b"<Error><Code>InternalError</Code><Message>Please try again.</Message></Error>",
}


class Gate:
    """WSGI middleware: holds the first request that fits a pattern (`METHOD /path?query`), or refuses all that fit;
    is slow, or too busy for a share of the requests."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app
        self.held: re.Pattern[str] | None = None
        self.refused: re.Pattern[str] | None = None
        self.reached, self.release = threading.Event(), threading.Event()
        self.delay = 0.0  # seconds before each answer
        self.busy = 0.0  # share of the requests that it asks to come again
        self.away = 0  # so many requests to come are refused as it would when it is down
        self.draw = random.Random(0)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        if self.refused and self.refused.search(request):
            return _refuse(environ, start_response, "403 Forbidden", DENIED)
        time.sleep(self.delay)
        if self.away:
            self.away -= 1
            return _refuse(environ, start_response, *next(iter(BUSY.items())))
        if self.draw.random() < self.busy:
            return _refuse(environ, start_response, *self.draw.choice(list(BUSY.items())))
        if self.held and self.held.search(request):
            self.held = None
            self.reached.set()
            self.release.wait(WAIT)
        return self.app(environ, start_response)

    @contextmanager
    def holding(self, pattern: str) -> Iterator[threading.Event]:
        """The next request that fits is held until the block ends; the event says that it is there."""
        self.held = re.compile(pattern)
        self.reached.clear()
        self.release.clear()
        try:
            yield self.reached
        finally:
            self.held = None
            self.release.set()

    @contextmanager
    def refusing(self, pattern: str) -> Iterator[None]:
        self.refused = re.compile(pattern)
        try:
            yield
        finally:
            self.refused = None


def _refuse(
    environ: dict[str, Any], start_response: Callable[..., Any], status: str, document: bytes
) -> Iterable[bytes]:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response(status, [("Content-Type", "application/xml")])
    return [document]


class Server:
    """The running server."""

    def __init__(self, address: str, port: int, gate: Gate) -> None:
        self.address, self.port, self.gate = address, port, gate

    def out(self, bucket: str) -> str:
        """An `out` in a bucket."""
        return f"s3://{bucket}/studies/one?endpoint_override={self.address}:{self.port}&scheme=http"

    def ask(self, method: str, path: str) -> str:
        request = urllib.request.Request(f"http://{self.address}:{self.port}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            return str(answer.read().decode())

    def buckets(self) -> list[str]:
        return _texts(self.ask("GET", ""), "Name")

    def keys(self, bucket: str) -> list[str]:
        """All objects of a bucket, as the server knows them (up to 1,000)."""
        return _texts(self.ask("GET", f"{bucket}?list-type=2"), "Key")

    def uploads(self, bucket: str) -> list[str]:
        """Keys of uploads in parts that were begun and neither completed nor given up."""
        return _texts(self.ask("GET", f"{bucket}?uploads"), "Key")


def _texts(document: str, tag: str) -> list[str]:
    return [item.text or "" for item in ElementTree.fromstring(document).iter() if item.tag.endswith(f"}}{tag}")]


@contextmanager
def serve(address: str = "127.0.0.1") -> Iterator[Server]:
    """Starts a server on a free port of this machine; its objects are in memory."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    gate = Gate(DomainDispatcherApplication(create_backend_app))
    handler = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None})
    server = make_server(address, 0, gate, threaded=True, request_handler=handler)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Server(address, server.server_port, gate)
    finally:
        gate.release.set()
        server.shutdown()
        thread.join(WAIT)
