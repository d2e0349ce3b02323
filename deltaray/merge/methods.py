"""The methods by name: what each takes, and the merge of one weight matrix by any of them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

from deltaray.merge.elementwise import Inner, Rule, core_space, knots, on_weights
from deltaray.merge.factors import Factors, Joint, Svd, decompose
from deltaray.merge.gam import align
from deltaray.merge.linear import concatenate, mean, total
from deltaray.merge.singular import iso_c, iso_cts, tsv

DENSITY: Mapping[Inner, float] = MappingProxyType({"mean": 1.0, "ties": 0.2, "dare": 0.5})


@dataclass(frozen=True)
class Options:
    """What may be asked of a merge; None and False: not asked for. Each method takes some of it only."""

    weights: tuple[float, ...] | None = None
    """One per adapter: multiply the updates. Methods that average divide them by their mean."""
    rank: int | None = None
    """The merged adapter's; otherwise the method's own."""
    scale: float | None = None
    """Multiplies the merged update."""
    density: float | None = None
    """TIES and DARE: the share of numbers that each adapter keeps (0.2, 0.5)."""
    seed: int | None = None
    """DARE (0)."""
    inner: Inner | None = None
    """KnOTS and Core Space: the rule that they apply in their space (ties)."""
    restore_norm: bool = False
    """GAM: scales each merged matrix to the norm of the plain mean."""
    skip_missing: bool = False
    """Averages leave out adapters that do not change a matrix, instead of counting them as zero."""

    def given(self) -> dict[str, object]:
        """What was asked for, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}


DEFAULTS = Options()


@dataclass(frozen=True)
class Task:
    """One weight matrix: the weighted updates of the adapters, and their joint frame.

    parts: the SVD of every core. name: of the matrix; DARE draws for each its own masks.
    """

    updates: Sequence[Factors]
    joint: Joint
    parts: Sequence[Svd]
    reference: int
    options: Options
    name: str

    def rule(self, name: Inner | None = None) -> Rule:
        """The elementwise rule of that name, or the inner one."""
        name = name or self.options.inner or "ties"
        density = DENSITY[name] if self.options.density is None else self.options.density
        digest = hashlib.sha256(f"{self.options.seed or 0}#{self.name}".encode()).digest()
        return Rule(name, density, int.from_bytes(digest[:4]))

    def fit(self, update: Factors) -> "Result":
        """The nearest update of the wished rank."""
        if self.options.rank is None or update.rank <= self.options.rank:
            return Result(update)
        part = decompose(update)
        kept = part.cut(self.options.rank)
        energy = float(part.values.square().sum())
        return Result(kept.factors(), float(kept.values.square().sum()) / energy if energy else 1.0)

    def expand(self, core: Factors) -> "Result":
        """The same of an update in the joint frame."""
        found = self.fit(core)
        return Result(self.joint.expand(found.update), found.kept)


@dataclass(frozen=True)
class Result:
    """A merged matrix and what is told about it."""

    update: Factors
    kept: float = 1.0
    """The share of its squared norm that cutting it to the rank has left."""
    undetermined: int = 0
    """GAM: directions that the reference does not determine."""


@dataclass(frozen=True)
class Method:
    """A merge method with what the rest of the program must know about it."""

    merge: Callable[[Task], Result]
    averages: bool
    """Whether it averages updates; otherwise it adds them."""
    dense: bool = False
    """Whether it makes matrices of the weights' own size."""


def _gam(task: Task) -> Result:
    aligned = align(task.parts, task.reference)
    core = aligned.mean()
    if task.options.restore_norm and (norm := core.norm()) > 0:
        core = core.times(mean(task.joint).norm() / norm)
    result = task.expand(core)
    return Result(result.update, result.kept, aligned.undetermined)


def _on_weights(name: Inner) -> Callable[[Task], Result]:
    def merge(task: Task) -> Result:
        sizes = sum(update.rank for update in task.updates), task.joint.left.shape[0], task.joint.right.shape[0]
        return Result(*on_weights(task.updates, task.rule(name), min(task.options.rank or sizes[0], *sizes[1:])))

    return merge


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "gam": Method(_gam, True),
        "mean": Method(lambda task: task.expand(mean(task.joint)), True),
        "task-arithmetic": Method(lambda task: task.expand(total(task.joint)), False),
        "cat": Method(lambda task: task.fit(concatenate(task.updates)), False),
        "ties": Method(_on_weights("ties"), True, dense=True),
        "dare": Method(_on_weights("dare"), True, dense=True),
        "knots": Method(lambda task: task.fit(knots(task.joint, task.rule())), True),
        "core-space": Method(lambda task: task.expand(core_space(task.joint, task.rule())), True),
        "tsv": Method(lambda task: task.expand(tsv(task.joint, task.options.rank)), False),
        "iso-c": Method(lambda task: task.expand(iso_c(task.joint, task.options.rank)), False),
        "iso-cts": Method(lambda task: task.expand(iso_cts(task.joint, task.options.rank)), False),
    }
)
"""By the name that `--method` takes, as in `recipe/merge_methods.py`, which says what each may be told."""
