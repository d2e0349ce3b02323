"""The supervisor's side of one program: what its child says, read within its time and no further than due.

Imports nothing but the standard library.
"""

import errno
import fcntl
import os
import select
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from deltaray.score.programs.confinement import CONFINED, COUNTED, EXCEPTIONS, OWN, PASSED, UNCOUNTED, WORD_BYTES

Said = dict[str, Any]
"""What the worker is told: `passed` and `failure` of a program, or why it was not run: `broken` or `unconfined`."""

START_SECONDS = 60.0
"""What a child may take to confine itself, on however busy a machine."""
THREADS = 512
"""What a program may start, all told."""
NOTIFY_RECEIVE, NOTIFY_SEND, NOTICE_BYTES, CONTINUE = 0xC0502100, 0xC0182101, 80, 1
HUNG_UP = select.POLLHUP | getattr(select, "POLLRDHUP", 0)


class Watch:
    """Reads what a child says, whatever it does to its end of the socket."""

    def __init__(self, child: socket.socket, worker: socket.socket, seconds: float) -> None:
        self.child, self.worker, self.seconds = child, worker, seconds
        self.listener: int | None = None
        self.said, self.unsent, self.threads = bytearray(), memoryview(b""), 0
        self.deadline = time.monotonic() + START_SECONDS

    def outcome(self, tests: list[str]) -> Said:
        try:
            if refusal := self._confined():
                return refusal
            self.deadline = time.monotonic() + self.seconds
            return self._tested(tests)
        finally:
            if self.listener is not None:
                os.close(self.listener)

    def _confined(self) -> Said | None:
        self.child.settimeout(START_SECONDS)
        try:
            said, descriptors, _, _ = socket.recv_fds(self.child, 1, 1)
            if said == COUNTED:
                (self.listener,) = descriptors
            self.child.setblocking(False)
            said = said if said not in (COUNTED, UNCOUNTED) else self._read(1)
            if said == CONFINED:
                return None
            with suppress(EOFError):
                self._read(500)
        except (EOFError, TimeoutError):
            return {"broken": "the process of a program could not be started"}
        return {"unconfined": self.said.decode(errors="replace")}

    def _tested(self, tests: list[str]) -> Said:
        passed, failure = 0, None
        try:
            code = self._read(1)[0]
            if code != PASSED:
                return {"passed": 0, "failure": f"program failed: {_name(code)}"}
            word = os.urandom(WORD_BYTES)
            self.unsent = memoryview(word + b"".join(map(_frame, tests)))
            for _ in tests:
                *begin, code = self._read(WORD_BYTES + 1)
                if bytes(begin) != word:
                    raise ValueError
                passed += code == PASSED
                failure = failure or (None if code == PASSED else f"test failed: {_name(code)}")
        except TimeoutError:
            failure = "out of time"
        except EOFError:
            failure = "ended early"
        except ValueError:
            passed, failure = 0, "program failed: it wrote where its results go"
        return {"passed": passed, "failure": failure}

    def _read(self, count: int) -> bytes:
        """
        Raises:
            TimeoutError: the time is over.
            EOFError: the child is gone, or has closed its end.
        """
        while len(self.said) < count:
            self._wait()
        taken = bytes(self.said[:count])
        del self.said[:count]
        return taken

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.worker, HUNG_UP)
        poll.register(self.child, select.POLLIN | (select.POLLOUT if self.unsent else 0))
        if self.listener is not None:
            poll.register(self.listener, select.POLLIN)
        left = self.deadline - time.monotonic()
        events = dict(poll.poll(max(0.0, left) * 1000))
        if left <= 0:
            raise TimeoutError
        if self.worker.fileno() in events:
            raise SystemExit  # nobody waits for the outcome
        if self.listener is not None and events.get(self.listener, 0) & select.POLLIN:
            self._admit(self.listener)
        if (event := events.get(self.child.fileno(), 0)) & select.POLLOUT:
            self._send()
        if event & ~select.POLLOUT:
            self._receive()

    def _receive(self) -> None:
        try:
            part = self.child.recv(1 << 16)
        except OSError:
            part = b""
        if not part:
            raise EOFError
        self.said += part

    def _send(self) -> None:
        try:
            self.unsent = self.unsent[self.child.send(self.unsent) :]
        except OSError:
            raise EOFError from None

    def _admit(self, listener: int) -> None:
        """Answers a thread that wants to start another. It may be gone by now."""
        notice = bytearray(NOTICE_BYTES)
        with suppress(OSError):
            fcntl.ioctl(listener, NOTIFY_RECEIVE, notice)
            self.threads += 1
            with suppress(OSError):
                if self.threads <= THREADS:
                    fcntl.ioctl(listener, NOTIFY_SEND, struct.pack("8sqiI", bytes(notice[:8]), 0, 0, CONTINUE))
                    return
            fcntl.ioctl(listener, NOTIFY_SEND, struct.pack("8sqiI", bytes(notice[:8]), 0, -errno.EAGAIN, 0))


def _name(code: int) -> str:
    """
    Raises:
        ValueError: no child of ours says that.
    """
    if code == OWN:
        return "an exception of its own"
    if code > len(EXCEPTIONS):
        raise ValueError
    return EXCEPTIONS[code - 1].__name__


def _frame(test: str) -> bytes:
    body = test.encode("utf-8", "surrogatepass")
    return len(body).to_bytes(8, "big") + body
