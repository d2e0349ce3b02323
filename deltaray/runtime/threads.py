"""Waiting for threads such that an interruption is heard at once."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

from deltaray.runtime.session import Capacity

Job = Callable[[], object]


def side_by_side(jobs: list[Job]) -> None:
    """Runs the jobs in threads; the first failure, or an interruption, ends the wait for the others at once.

    The threads are daemons: what they wait for ends with Ray.
    """
    free = Capacity(0, 0)
    as_room_allows(jobs, [free] * len(jobs), free)


def as_room_allows(jobs: list[Job], needs: list[Capacity], capacity: Capacity) -> None:
    """The same, but each job starts only when what it needs is free; failures and interruptions as there."""
    ended: SimpleQueue[tuple[int, BaseException | None]] = SimpleQueue()

    def work(number: int) -> None:
        try:
            jobs[number]()
        except BaseException as error:  # a panic of Rust code is not an `Exception`, and would never be heard of
            ended.put((number, error))
        else:
            ended.put((number, None))

    waiting, running = list(range(len(jobs))), set[int]()
    while waiting or running:
        for number in startable(waiting, [needs[job] for job in running], needs, capacity):
            waiting.remove(number)
            running.add(number)
            threading.Thread(target=work, args=(number,), daemon=True).start()
        number, failure = ended.get()
        if failure is not None:
            raise failure
        running.remove(number)


def startable(waiting: list[int], running: list[Capacity], needs: list[Capacity], capacity: Capacity) -> list[int]:
    """Which waiting jobs fit beside the running ones, in order; with none running the first starts anyway. Pure.

    A job that alone is larger than the cluster then runs alone, on what there is.
    """
    cpus, gpus = sum(item.cpus for item in running), sum(item.gpus for item in running)
    started: list[int] = []
    for number in waiting:
        need = needs[number]
        fits = cpus + need.cpus <= capacity.cpus and gpus + need.gpus <= capacity.gpus
        if fits or not (running or started):
            started.append(number)
            cpus, gpus = cpus + need.cpus, gpus + need.gpus
    return started
