"""Waiting for threads such that an interruption is heard at once."""

import threading
from collections.abc import Callable
from queue import SimpleQueue


def side_by_side(jobs: list[Callable[[], object]]) -> None:
    """Runs the jobs in threads; the first failure, or an interruption, ends the wait for the others at once.

    The threads are daemons: what they wait for ends with Ray.
    """
    ended: SimpleQueue[Exception | None] = SimpleQueue()

    def work(job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:
            ended.put(error)
        else:
            ended.put(None)

    for job in jobs:
        threading.Thread(target=work, args=(job,), daemon=True).start()
    for _ in jobs:
        failure = ended.get()
        if failure is not None:
            raise failure
