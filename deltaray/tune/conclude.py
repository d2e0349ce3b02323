"""What the trials have shown together: the table, the best student and the landscape, from the records alone."""

from typing import Any

import pyarrow as pa

from deltaray.data.storage.cells import csv_bytes
from deltaray.data.store import Store
from deltaray.recipe.check_exploration import objectives_of
from deltaray.recipe.study import Study
from deltaray.tune.landscape import Point, landscape
from deltaray.tune.records import Record

NUMBERS = pa.float64()
TRIALS = pa.schema(
    [
        pa.field("trial", pa.string(), nullable=False),
        pa.field("pairing", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in ("chosen", "rejected", "scorer", "loss", "lora")),
        *(pa.field(name, NUMBERS) for name in ("min_delta", "max_delta", "learning_rate", "beta")),
        pa.field("pairs", pa.int64()),  # trained on, the mean over the seeds
        *(pa.field(name, NUMBERS) for name in ("delta", "delta_low", "delta_high", "quality")),
        *(pa.field(name, NUMBERS) for name in ("heldout_accuracy", "selection", "mean", "mean_stderr")),
        *(pa.field(name, NUMBERS) for name in ("gain", "gain_low", "gain_high")),
        *(pa.field(name, NUMBERS) for name in ("logps_chosen_change", "logps_rejected_change")),
        pa.field("objectives", pa.list_(NUMBERS)),  # in the recipe's order
        pa.field("best", pa.bool_(), nullable=False),  # no other trial is as good on every objective, better on one
        pa.field("signatures", pa.string(), nullable=False),  # of failing runs, with commas
        pa.field("seeds", pa.int64()),
        pa.field("seconds", NUMBERS),
        pa.field("reason", pa.string()),  # why it failed or was stopped
    ]
)
"""One row per trial; null where a trial has no such thing."""


def conclude(study: Study, store: Store, records: dict[str, Record]) -> None:
    """Writes `tuning/trials.parquet` and `.csv`, `tuning/best.json` and `tuning/landscape.json`."""
    best, objectives = front(records, objectives_of(study.recipe)), objectives_of(study.recipe)
    rows = [row_of(record, objectives) | {"best": name in best} for name, record in sorted(records.items())]
    table = pa.Table.from_pylist(rows, schema=TRIALS)
    store.write_table("tuning/trials.parquet", table, TRIALS)
    store.write_bytes("tuning/trials.csv", _csv(table))
    if best:
        store.write_json("tuning/best.json", best_json(store, [records[name] for name in best], objectives))
    store.write_json("tuning/landscape.json", landscape(points_of(records, objectives[0])))


def _csv(table: pa.Table) -> bytes:
    """A list has no cell of its own in CSV: its numbers with spaces between them."""
    values = [
        None if it is None else " ".join(f"{value:.6g}" for value in it) for it in table["objectives"].to_pylist()
    ]
    place = table.schema.get_field_index("objectives")
    return csv_bytes(table.set_column(place, "objectives", pa.array(values, pa.string())))


def row_of(record: Record, objectives: list[str]) -> dict[str, Any]:
    """A record as a row of `TRIALS`. Pure."""

    def inner(section: str, key: str) -> Any:
        return (record.get(section) or {}).get(key)

    runs = list(record.get("runs", {}).values())
    values = [record.get("objectives", {}).get(name) for name in objectives]
    return {
        **record["settings"],
        "trial": record["name"],
        "pairing": record["label"],
        "state": record["state"],
        "pairs": round(sum(run["pairs"] for run in runs) / len(runs)) if runs else None,
        "delta": inner("delta", "mean"),
        "delta_low": inner("delta", "low"),
        "delta_high": inner("delta", "high"),
        "quality": inner("quality", "mean"),
        "heldout_accuracy": inner("heldout_accuracy", "mean"),
        "selection": inner("selection", "mean"),
        "mean": inner("mean", "mean"),
        "mean_stderr": inner("mean", "stderr"),
        "gain": inner("gain", "difference"),
        "gain_low": inner("gain", "low"),
        "gain_high": inner("gain", "high"),
        "logps_chosen_change": record.get("logps_chosen_change"),
        "logps_rejected_change": record.get("logps_rejected_change"),
        "objectives": None if None in values else values,
        "signatures": ",".join(record.get("signatures", ())),
        "seeds": len(record.get("seeds", ())),
        "seconds": sum(record.get("seconds", {}).values()),
        "reason": record.get("reason"),
    }


def front(records: dict[str, Record], objectives: list[str]) -> list[str]:
    """The finished trials that no other beats on every objective (with one objective: the best), the best on the first
    objective first. Pure."""
    scored = {
        name: [record["objectives"][it] for it in objectives]
        for name, record in records.items()
        if record["state"] == "finished" and all(record["objectives"].get(it) is not None for it in objectives)
    }

    def beaten(mine: list[float]) -> bool:
        return any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in scored.values())

    return sorted(
        (name for name, values in scored.items() if not beaten(values)), key=lambda name: [-it for it in scored[name]]
    )


def best_json(store: Store, best: list[Record], objectives: list[str]) -> dict[str, Any]:
    """Where the best student is. Of its seeds it is the first: to pick the best one would pick luck."""
    [first, *others] = best
    paths = {str(run["seed"]): store.address(run["path"]) for run in first["runs"].values()}
    return {
        "path": next(iter(paths.values())),
        "paths": paths,
        "trial": first["name"],
        "pairing": first["label"],
        "settings": first["settings"],
        "objectives": {name: first["objectives"][name] for name in objectives},
        "as_good_otherwise": [record["name"] for record in others],
    }


def points_of(records: dict[str, Record], objective: str) -> list[Point]:
    """One point per pairing whose delta and gain are known: of several trials the best on the first objective. Pure."""
    known = [it for it in records.values() if it["state"] == "finished" and it.get("gain") and _delta(it) is not None]
    known.sort(key=lambda it: (-(it["objectives"].get(objective) or float("-inf")), it["name"]))
    best: dict[str, Record] = {}
    for record in known:
        best.setdefault(record["pairing"], record)
    return [_point(record) for record in sorted(best.values(), key=lambda it: it["delta"]["mean"])]


def _delta(record: Record) -> float | None:
    return (record.get("delta") or {}).get("mean")


def _point(record: Record) -> Point:
    delta, gain, windows = record["delta"], record["gain"], ("min_delta", "max_delta")
    window = [f"{name} {record['settings'][name]:g}" for name in windows if record["settings"][name] is not None]
    return Point(
        label=record["label"] + (f" ({', '.join(window)})" if window else ""),
        trial=record["name"],
        delta=delta["mean"],
        delta_low=delta["low"],
        delta_high=delta["high"],
        gain=gain["difference"],
        gain_low=gain["low"],
        gain_high=gain["high"],
        quality=(record.get("quality") or {}).get("mean"),
        chosen_change=record.get("logps_chosen_change"),
        rejected_change=record.get("logps_rejected_change"),
        gains=tuple(record.get("gains", ())),
    )
