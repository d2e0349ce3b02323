"""Following a job: its log as it grows, and how it ended."""

import asyncio
import time
from typing import Any

from deltaray.cli.submit.job import OVER
from deltaray.errors import StageError, UserError
from deltaray.runtime.terminal import Terminal

PAUSE = 1.0
PATIENCE = 300.0
"""Seconds without any answer of the job server before following is given up."""


class Follower:
    """Shows what a job says, each line once, also when the connection breaks."""

    def __init__(self, client: Any, name: str, terminal: Terminal) -> None:
        self.client, self.name, self.terminal = client, name, terminal
        self.shown = 0  # characters of the log
        self.line = ""  # the beginning of one that has not come yet
        self.status = ""

    def follow(self) -> None:
        """Until the job is over.

        Raises:
            StageError: the job failed, or the cluster does not answer any more.
            UserError: the job ended with the user's mistake.
            KeyboardInterrupt: the job was stopped.
        """
        answered = time.monotonic()
        while self.status not in OVER:
            try:
                asyncio.run(self._tail())
                self._ask()
                answered = time.monotonic()
            except Exception as error:  # aiohttp's, requests' and Ray's own; all mean that the server is not there
                if time.monotonic() - answered > PATIENCE:
                    raise StageError(
                        f"job {self.name}: the cluster has not answered for {PATIENCE:g} s ({error}); the same command "
                        "follows the job again, or resumes the study if it is gone"
                    ) from None
            time.sleep(PAUSE)
        self._show(self.client.get_job_logs(self.name), 0)
        if self.line:
            self._show("\n", self.shown)
        self._conclude()

    async def _tail(self) -> None:
        place = 0
        async for text in self.client.tail_job_logs(self.name):
            self._show(text, place)
            place += len(text)

    def _show(self, text: str, place: int) -> None:
        """Shows what is new of a piece of the log that begins at `place`."""
        self.line += text[max(0, self.shown - place) :]
        self.shown = max(self.shown, place + len(text))
        whole, end, self.line = self.line.rpartition("\n")  # of half a line nobody can tell what it holds
        self.terminal.pass_on(whole + end)

    def _ask(self) -> None:
        self.info = self.client.get_job_info(self.name)
        if self.status != self.info.status.value:
            self.status = self.info.status.value
            self.terminal.say(f"job {self.name}: {self.status.lower()}")

    def _conclude(self) -> None:
        if self.status == "STOPPED" or self.info.driver_exit_code == 130:
            raise KeyboardInterrupt
        if self.status == "FAILED" and self.info.driver_exit_code == UserError.exit_code:
            raise UserError(f"job {self.name}: refused; the messages above say what to fix")
        if self.status == "FAILED":
            reason = (self.info.message or "").strip().splitlines()
            raise StageError(
                f"job {self.name} failed: {reason[0] if reason else 'no message'}\nwhat is committed is safe: fix the "
                "cause and run the same command again to resume"
            )
