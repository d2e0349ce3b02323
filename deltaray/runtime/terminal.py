"""What the user sees: results on stdout, progress and messages on stderr, everybody else's chatter in a log file.

Ray, vLLM and DeepSpeed write to the process's file descriptors from several languages, so the descriptors themselves
are pointed at the log while a stage runs; our own console keeps private copies of the real ones.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EIO, EPIPE
from io import FileIO, TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from deltaray.errors import StageError
from deltaray.text.screen import json_escaped, printable
from deltaray.text.secrets import without_known, without_secrets

PLAIN_INTERVAL = 5.0
"""Seconds between progress lines when stderr is not a terminal."""

PLAIN_WIDTH = 160

Listener = Callable[[str, str, int, int], None]
"""Told of all progress: (stage, item, done, total)."""


class Terminal:
    """The real stdout and stderr, whatever happens to descriptors 1 and 2."""

    def __init__(self) -> None:
        self.out, self.err = _console(1), _console(2)
        self.log: Path | None = None

    def say(self, text: str) -> None:
        """A message; whatever it quotes, no secret is shown."""
        self.err.print(without_secrets(text))

    def result(self, text: str) -> None:
        self.out.print(text)

    def result_json(self, value: Any) -> None:
        text = json_escaped(json.dumps(value, indent=2, ensure_ascii=False))
        self.out.file.write(without_known(text) + "\n")
        self.out.file.flush()

    def pass_on(self, text: str) -> None:
        """Whole lines of somebody else's log."""
        lines = without_secrets(text.replace("\r\n", "\n").replace("\r", "\n"))
        self.err.file.write(printable(lines))
        self.err.file.flush()

    @contextmanager
    def chatter_to(self, log: Path) -> Iterator[None]:
        """Sends whatever is written to descriptors 1 and 2 into `log` meanwhile."""
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        self.log = log
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):  # the log's disk may be full
                    stream.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Only our own warnings are seen meanwhile, not what the libraries write."""
        notes, ours = _Notes(self), logging.getLogger("deltaray")
        ours.addHandler(notes)
        try:
            with self.chatter_to(Path(os.devnull)):
                yield
        finally:
            ours.removeHandler(notes)

    @contextmanager
    def progress(self, stage: str, unit: str, listener: Listener | None = None) -> Iterator["StageProgress"]:
        """One live view of a stage; plain lines when stderr is not a terminal."""
        live = _bars(self.err) if self.err.is_terminal else None
        view = StageProgress(self, stage, unit, live, listener)
        if live is None:
            yield view
            return
        with live:
            yield view


class _Notes(logging.Handler):
    """Says our own warnings on a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.say(f"note: {record.getMessage()}")


class _Screen(Console):
    """Shows every text as it is: no markup, no emoji, no control characters, no secret of the environment."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(without_known(text)), **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def _console(descriptor: int) -> Console:
    """On a private copy of the descriptor; what goes into a pipe or a file is not cut to a terminal's width."""
    width = None if os.isatty(descriptor) else PLAIN_WIDTH
    raw = _Output(os.dup(descriptor), messages=descriptor == 2)
    file = TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
    return _Screen(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


class _Output(FileIO):
    """A descriptor whose reader may go away (a closed terminal, an ended pipe), which must not cost hours of work."""

    def __init__(self, descriptor: int, messages: bool) -> None:
        super().__init__(descriptor, "w")
        self.messages = messages  # worth less than the work; what a command was asked for is not

    def write(self, data: Any) -> int:
        """Raises StageError if a result cannot be written, to a full disk for example."""
        left = memoryview(data)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            if not (self.messages or error.errno in (EIO, EPIPE)):
                raise StageError(f"the output cannot be written: {error.strerror}") from None
        return len(data)


def _bars(console: Console) -> Progress:
    told, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    return Progress(
        *(told, BarColumn(), MofNCompleteColumn(), note, TimeElapsedColumn()),
        console=console,
        refresh_per_second=4,
        redirect_stdout=False,  # sys.stdout and sys.stderr stay what they are: chatter belongs into the log
        redirect_stderr=False,
    )


class StageProgress:
    """Counts of one stage, a line per item (a teacher, a student, …)."""

    def __init__(
        self, terminal: Terminal, stage: str, unit: str, live: Progress | None, listener: Listener | None
    ) -> None:
        self.terminal, self.stage, self.unit, self.live, self.listener = terminal, stage, unit, live, listener
        self.tasks: dict[str, TaskID] = {}
        self.items: dict[str, Item] = {}

    def update(self, name: str, done: int, total: int, tokens: int = 0, note: str = "") -> None:
        """`done` of `total` units of `name` are finished; `tokens` so far (0: not counted)."""
        item = self.items.setdefault(name, Item())
        item.advance(done, total, tokens, note)
        if self.listener is not None:
            self.listener(self.stage, name, done, total)
        if self.live is not None:
            if name not in self.tasks:
                self.tasks[name] = self.live.add_task(f"{self.stage} {name}", total=total, note="")
            self.live.update(self.tasks[name], completed=done, total=total, note=item.describe())
        elif done >= total or time.monotonic() - item.printed > PLAIN_INTERVAL:
            item.printed = time.monotonic()
            self.terminal.say(f"{self.stage} {name}: {done}/{total} {self.unit}{item.describe(', ')}")

    @property
    def done(self) -> int:
        return sum(item.done for item in self.items.values())

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items.values())


class Item:
    """One line of progress. Its speed counts from the first result on, so that an engine's start does not slow it."""

    def __init__(self) -> None:
        self.printed = time.monotonic()  # the first plain line comes after an interval
        self.first: tuple[float, int, int] | None = None  # when, and done and tokens then
        self.done = self.total = self.tokens = 0
        self.note = ""

    def advance(self, done: int, total: int, tokens: int, note: str) -> None:
        self.done, self.total, self.tokens, self.note = done, total, tokens or self.tokens, note
        if done and self.first is None:
            self.first = time.monotonic(), done, self.tokens

    def describe(self, lead: str = "") -> str:
        parts = [*self._speed()] + ([self.note] if self.note else [])
        return lead + ", ".join(parts) if parts else ""

    def _speed(self) -> Iterator[str]:
        if self.first is None or self.done == self.first[1]:
            return
        since, done, tokens = self.first
        seconds = max(time.monotonic() - since, 1e-3)
        if self.tokens > tokens:
            yield f"{(self.tokens - tokens) / seconds:,.0f} tokens/s"
        if self.done < self.total:
            yield f"{seconds / (self.done - done) * (self.total - self.done):,.0f} s left"
