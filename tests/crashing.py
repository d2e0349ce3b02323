"""A crash before and after every single change of a store's files."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltaray.data.store import Store


class CrashError(BaseException):
    """Stands for the end of the process."""


class Crashing(Store):
    """A store whose process ends at its `left`-th change of a file, half of the times just after it."""

    left, after = 0, False

    def _change(self, change: Callable[..., Any], *arguments: Any) -> None:
        Crashing.left -= 1
        if Crashing.left == 0 and not Crashing.after:
            raise CrashError
        change(*arguments)
        if Crashing.left == 0:
            raise CrashError

    def write_bytes(self, path: str, content: Any) -> None:
        self._change(super().write_bytes, path, content)

    def move(self, source: str, target: str) -> None:
        self._change(super().move, source, target)

    def delete(self, paths: Any) -> None:
        for path in paths:
            self._change(super().delete, [path])


def crashes(base: Path, work: Path, run: Callable[[Store], None]) -> Iterator[Store]:
    """The store as every possible crash of `run` leaves it, each starting from a copy of `base`."""
    for after in (False, True):
        at = 0
        crashed = True
        while crashed:
            at += 1
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(base, work)
            Crashing.left, Crashing.after = at, after
            try:
                run(Crashing(str(work)))
                crashed = False
            except CrashError:
                yield Store(str(work))
        assert at > 10
