"""What the parts of a study demand of a cluster, and whether its nodes have room for it. All pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from deltaray.errors import UserError
from deltaray.recipe.models import Engine
from deltaray.recipe.scorers import Judge, RewardModel
from deltaray.recipe.study import Study, base_name
from deltaray.runtime.session import STREAM_CPUS, TRIAL_CPUS, Capacity

ANY = "*"
"""The accelerator of a group of which only the totals are known."""
SLACK = 1e-9


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes of a cluster, `most` of them when it is fully grown."""

    name: str
    cpus: float
    gpus: float
    most: int
    accelerator: str | None = None  # Ray's name of the GPUs, where the group declares one


@dataclass(frozen=True)
class Bundle:
    """`count` processes (replicas, workers), each of which must find its room on one node."""

    count: int
    cpus: float
    gpus: float = 0
    accelerator: str | None = None


@dataclass(frozen=True)
class Demand:
    """Replicas or workers of one kind: `least` of them must find room at the same time for anything to start at all."""

    stage: str
    key: str
    what: str
    each: tuple[Bundle, ...]  # of one replica
    least: int
    most: int
    beside: float = STREAM_CPUS  # CPUs of the tasks around them

    def bundles(self, replicas: int) -> list[Bundle]:
        """What so many replicas take."""
        around = [Bundle(1, self.beside)] if self.beside else []
        return [replace(bundle, count=bundle.count * replicas) for bundle in self.each] + around

    def total(self, replicas: int) -> Capacity:
        """The same, summed."""
        bundles = self.bundles(replicas)
        return Capacity(sum(it.count * it.cpus for it in bundles), sum(it.count * it.gpus for it in bundles))


def whole(capacity: Capacity) -> list[NodeGroup]:
    """A cluster of which only the totals are known, as if it were one node."""
    return [NodeGroup("the cluster", capacity.cpus, capacity.gpus, 1, ANY)]


def largest(groups: list[NodeGroup]) -> Capacity:
    """All groups fully grown."""
    return Capacity(sum(it.most * it.cpus for it in groups), sum(it.most * it.gpus for it in groups))


def demands(study: Study, capacity: Capacity) -> list[Demand]:
    """What each part of the study needs at least, in the order of the stages."""
    return [*_generating(study, capacity), *_scoring(study, capacity), *_training(study, capacity),
            *_exploring(study, capacity), *_evaluating(study, capacity)]  # fmt: skip


def _generating(study: Study, capacity: Capacity) -> Iterator[Demand]:
    if study.extensions and study.extensions.by.endpoint is None:
        engine = study.extensions.by.engine
        yield _engine_demand("extend", "extensions.by.engine", "vLLM for extensions", engine, capacity)
    for name, teacher in study.teachers.items():
        if teacher.endpoint is None:
            key = f"teachers.{base_name(name)}.engine"
            yield _engine_demand("generate", key, f"vLLM for teacher {name}", teacher.engine, capacity)


def _scoring(study: Study, capacity: Capacity) -> Iterator[Demand]:
    for name, scorer in study.scorers.items():
        if isinstance(scorer, Judge) and scorer.by.endpoint is None:
            key = f"scorers.{name}.by.engine"
            yield _engine_demand("score", key, f"vLLM for judge {name}", scorer.by.engine, capacity)
        if isinstance(scorer, RewardModel):
            gpus = scorer.gpus if scorer.gpus is not None else float(capacity.gpus > 0)
            each, key = Bundle(1, scorer.cpus, gpus), f"scorers.{name}.workers"
            yield Demand("score", key, f"reward model {name}", (each,), scorer.workers, scorer.workers)


def _training(study: Study, capacity: Capacity) -> Iterator[Demand]:
    training = study.recipe.training
    if training is not None:
        gpus = capacity.gpus_per_worker(training.gpus_per_worker)
        each, count = Bundle(1, training.cpus_per_worker, gpus, training.accelerator), training.workers
        most = count * training.groups
        yield Demand("train", "training.workers", f"{count} training workers", (each,), count, most, beside=0)


def _exploring(study: Study, capacity: Capacity) -> Iterator[Demand]:
    """Trials side by side: each is a group of workers, and the few tasks of the process that leads it."""
    training, exploration = study.recipe.training, study.recipe.exploration
    if training is not None and exploration is not None:
        gpus = capacity.gpus_per_worker(training.gpus_per_worker)
        each = Bundle(training.workers, training.cpus_per_worker, gpus, training.accelerator)
        what = f"a trial of {training.workers} workers"
        yield Demand("tune", "training.workers", what, (each,), 1, exploration.trials_at_once, beside=TRIAL_CPUS)


def _evaluating(study: Study, capacity: Capacity) -> Iterator[Demand]:
    for name, student in study.students.items() if study.recipe.evaluation else ():
        yield _engine_demand("evaluate", "student.engine", f"vLLM for {name}", student.engine, capacity)


def _engine_demand(stage: str, key: str, what: str, engine: Engine, capacity: Capacity) -> Demand:
    gpus, accelerator = capacity.gpus_of(engine), engine.accelerator
    each: tuple[Bundle, ...] = (Bundle(1, engine.cpus, gpus, accelerator),)
    if gpus and engine.arguments.get("distributed_executor_backend") == "ray":  # vLLM places each GPU by itself
        world = engine.tensor_parallel * engine.pipeline_parallel
        each = (Bundle(world, 0, 1), Bundle(1, engine.cpus, 0, accelerator))
    return Demand(stage, key, what, each, engine.replicas, engine.max_replicas or engine.replicas)


class Nodes:
    """The nodes of a fully grown cluster with what is still free on each."""

    def __init__(self, groups: list[NodeGroup]) -> None:
        nodes = [(group, [group.cpus, group.gpus]) for group in groups for _ in range(group.most)]
        self.nodes = sorted(nodes, key=lambda node: (node[0].gpus, node[0].cpus))  # what needs few GPUs takes the least

    def place(self, bundle: Bundle) -> dict[str, int]:
        """Takes room for as many of the bundle as there is: how many went to which group."""
        placed: dict[str, int] = {}
        for group, free in self.nodes:
            count = min(bundle.count - sum(placed.values()), _fitting(bundle, group, free))
            if count:
                free[0] -= count * bundle.cpus
                free[1] -= count * _share(bundle.gpus)
                placed[group.name] = placed.get(group.name, 0) + count
        return placed


def _share(gpus: float) -> float:
    """What a bundle takes of a node's GPUs: fractions of one never span two cards."""
    return 1 / int(1 / gpus + SLACK) if 0 < gpus < 1 else gpus


def _fitting(bundle: Bundle, group: NodeGroup, free: list[float]) -> int:
    """How many of the bundle a node has room for."""
    if bundle.accelerator is not None and group.accelerator not in (bundle.accelerator, ANY):
        return 0
    wanted = ((bundle.cpus, free[0]), (_share(bundle.gpus), free[1]))
    return min((int(has / needs + SLACK) for needs, has in wanted if needs), default=bundle.count)


def refuse_impossible(study: Study, capacity: Capacity) -> None:
    """Refuses what could only wait for ever on a cluster of which the totals are known.

    Raises:
        UserError: names the key, what it demands and what the cluster has.
    """
    fix = "ask for less, or give the cluster more (cluster.{kind}, cluster.address)"
    lines = [lacking(demand, whole(capacity), "the cluster", fix) for demand in demands(study, capacity)]
    if any(lines):
        raise UserError("\n".join(dict.fromkeys(line for line in lines if line)))


def lacking(demand: Demand, groups: list[NodeGroup], cluster: str, fix: str) -> str | None:
    """Why a demand finds no room even alone on the fully grown cluster; None if it does."""
    wanted, room = demand.total(demand.least), largest(groups)
    for kind in ("cpus", "gpus"):
        if getattr(wanted, kind) > getattr(room, kind) + SLACK:
            needs = f"{getattr(wanted, kind):g} {kind.upper().removesuffix('S')}s"
            has = f"{cluster} has {getattr(room, kind):g}"
            return f"{demand.key}: {demand.what} needs {needs}, {has}; {fix.replace('{kind}', kind)}"
    nodes = Nodes(groups)
    for bundle in demand.bundles(demand.least):
        placed = sum(nodes.place(bundle).values())
        if placed < bundle.count:
            kind, needs = "gpus" if bundle.gpus else "cpus", f"{bundle.count} x {describe(bundle)}"
            has = f"{cluster} has nodes for {placed}"
            return f"{demand.key}: {demand.what} needs {needs}, {has}; {fix.replace('{kind}', kind)}"
    return None


def describe(bundle: Bundle) -> str:
    """`1 CPU + 4 GPU (H100) on one node`."""
    parts = [f"{bundle.cpus:g} CPU"] if bundle.cpus else []
    kind = f" ({bundle.accelerator})" if bundle.accelerator else ""
    parts += [f"{bundle.gpus:g} GPU{kind}"] if bundle.gpus else []
    return " + ".join(parts) + (" on one node" if len(parts) > 1 or bundle.gpus > 1 else "")
