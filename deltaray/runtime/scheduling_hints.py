"""Says why a stage stands still on a cluster that others use, too: what has no room, and who has it."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

INTERVAL = 15.0
"""Seconds between two looks at the progress."""
PATIENCE = 60.0
"""Seconds without progress after which the cluster is asked; engines and workers may need as long to start."""
AGAIN = 600.0
"""Seconds before the same is said once more."""
SHOWN = 5
"""Jobs that are named."""
HELPERS = frozenset({"_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker"})
"""Ray Data's own actors; they outlive their jobs and take no room."""
_GROUP = re.compile(r"_group(_\d+)?_[0-9a-f]+$")


@dataclass(frozen=True)
class Crowd:
    """What a cluster says of its room."""

    demands: Sequence[tuple[Mapping[str, float], int]]  # what waits: resources, and how many want them
    room: Mapping[str, tuple[float, float]]  # resource -> (used, total)
    others: Sequence[tuple[str, Counter[str]]]  # (who, their actors by class) of each other job

    def told(self) -> str | None:
        """One line; None if nothing waits. Pure."""
        if not self.demands:
            return None
        wanted = ", ".join(f"{count} x {_bundle(bundle)}" for bundle, count in self.demands)
        kinds = [(kind, *self.room[kind]) for kind in ("CPU", "GPU") if kind in self.room]
        free = ", ".join(f"{total - used:g} of {total:g} {kind}s" for kind, used, total in kinds)
        shown = [f"{who}: {_counted(actors)}" for who, actors in self.others[:SHOWN]]
        shown += [f"{rest} more"] if (rest := len(self.others) - SHOWN) > 0 else []
        beside = f"; beside it run {'; '.join(shown)}" if shown else ""
        return f"the cluster has no room for {wanted}; free are {free}{beside}"


def _bundle(bundle: Mapping[str, float]) -> str:
    """In a placement group Ray asks for each resource under names of the group, up to twice; they mean the same."""
    plain = {_GROUP.sub("", kind): amount for kind, amount in bundle.items() if not kind.startswith("bundle_group_")}
    return " + ".join(f"{amount:g} {kind}" for kind, amount in plain.items()) or "nothing"


def _counted(actors: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in actors.most_common())


def look() -> Crowd:
    """Asks the cluster that this process has joined; raises what Ray raises when it does not answer."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    context = ray.get_runtime_context()
    status = get_cluster_status(context.gcs_address)
    asked = [*status.resource_demands.ray_task_actor_demand, *status.resource_demands.placement_group_demand]
    demands = [(request.bundle, request.count) for demand in asked for request in demand.bundles_by_count]
    room = {usage.resource_name: (usage.used, usage.total) for usage in status.cluster_resource_usage}
    state = ray._private.state.state
    jobs = {job["JobID"]: job for job in state.job_table()}
    actors: dict[str, Counter[str]] = {}
    for actor in state.actor_table(None, None, "ALIVE").values():
        if actor["JobID"] != context.get_job_id() and actor["ActorClassName"] not in HELPERS:
            actors.setdefault(actor["JobID"], Counter())[actor["ActorClassName"]] += 1
    return Crowd(demands, room, [(_who(jobs.get(job, {}), job), found) for job, found in actors.items()])


def _who(job: Mapping[str, Any], name: str) -> str:
    if not job:
        return f"job {name}"
    return f"`{job['Entrypoint']}` (process {job['DriverPid']} on {job['DriverIPAddress']})"


class RoomWatch:
    """While it is entered, a thread tells `say` when `progress` stands still for want of room."""

    def __init__(self, progress: Callable[[], Any], say: Callable[[str], None]) -> None:
        """`progress`: anything that changes whenever something is done."""
        self.progress, self.say = progress, say
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        seen, since, said = self.progress(), time.monotonic(), float("-inf")
        while not self.over.wait(INTERVAL):
            now = time.monotonic()
            if (found := self.progress()) != seen:
                seen, since = found, now
            elif now - since >= PATIENCE and now - said >= AGAIN:
                with suppress(Exception):  # a cluster that does not answer has more to tell than this
                    if text := look().told():
                        self.say(f"nothing is done for {now - since:.0f} s: {text}")
                        said = now
