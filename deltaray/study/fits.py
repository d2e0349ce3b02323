"""What of a study fits on the nodes that a cluster file may start: at once, in turn, or never."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from deltaray.errors import UserError
from deltaray.recipe.study import Study
from deltaray.runtime.demands import Demand, NodeGroup, Nodes, demands, describe, lacking, largest
from deltaray.runtime.threads import startable


@dataclass(frozen=True)
class Fit:
    """What becomes of one demand on the fully grown cluster."""

    stage: str
    key: str
    what: str
    needs: str
    verdict: str  # fits | waits (runs as soon as others of its stage have ended) | never
    room: int  # replicas or workers that find room, of `most`
    most: int
    groups: tuple[str, ...]
    reason: str | None = None  # why never


def fits(study: Study, groups: list[NodeGroup], cluster: str) -> list[Fit]:
    """Each part of a study on a cluster: at once, in turn, or never. Pure.

    Args:
        cluster: how the messages call it.
    """
    wanted = demands(study, largest(groups))
    return [fit for stage in dict.fromkeys(it.stage for it in wanted) for fit in _stage(wanted, stage, groups, cluster)]


def _stage(wanted: list[Demand], stage: str, groups: list[NodeGroup], cluster: str) -> Iterator[Fit]:
    """A stage's parts in the order in which they start, which is by what they take fully grown."""
    mine = [demand for demand in wanted if demand.stage == stage]
    reasons = [lacking(demand, groups, cluster, f"ask for less, or let {cluster} start more") for demand in mine]
    possible = [number for number, reason in enumerate(reasons) if reason is None]
    first = startable(possible, [], [demand.total(demand.most) for demand in mine], largest(groups))
    together = Nodes(groups)
    first = [number for number in first if _placed(together, mine[number])]
    for number, (demand, reason) in enumerate(zip(mine, reasons, strict=True)):
        verdict = "never" if reason else "fits" if number in first else "waits"
        grown = demand.bundles(demand.most)[0]
        placed = Nodes(groups).place(grown)
        room = sum(placed.values()) * demand.most // grown.count
        needs = f"{demand.least} x {describe(demand.each[0])}"
        yield Fit(stage, demand.key, demand.what, needs, verdict, room, demand.most, tuple(placed), reason)


def _placed(nodes: Nodes, demand: Demand) -> bool:
    """Takes room for the least that a demand needs, beside what has been placed already."""
    return all(sum(nodes.place(bundle).values()) == bundle.count for bundle in demand.bundles(demand.least))


def fits_table(found: list[Fit], cluster: str) -> Table:
    """What fits, what waits, what never fits, for people."""
    table = Table(title=f"on {cluster}, fully grown", title_justify="left")
    for column in ("stage", "what", "needs", "verdict", "room for", "on"):
        table.add_column(column)
    for fit in found:
        room = f"{fit.room} of {fit.most}"
        table.add_row(fit.stage, fit.what, fit.needs, fit.verdict, room, ", ".join(fit.groups))
    return table


def fits_json(found: list[Fit], groups: list[NodeGroup]) -> dict[str, Any]:
    """The same for machines."""
    return {"fits": [asdict(fit) for fit in found], "groups": [asdict(group) for group in groups]}


def refuse_never(found: list[Fit]) -> None:
    """Raises UserError for all that would wait for ever."""
    reasons = [fit.reason for fit in found if fit.reason]
    if reasons:
        raise UserError("\n".join(dict.fromkeys(reasons)))
