"""The table of the paper for a terminal. Pure: what `aggregation` found in, text out."""

from typing import Any

from rich.table import Table


def aggregation_table(found: dict[str, Any], tasks: list[str]) -> Table:
    """One row per model, per cent with standard errors, and two differences in points with their intervals."""
    table = Table(title=_title(found), title_justify="left")
    table.add_column("model")
    for column in ("deltas", *tasks, "mean", "over the student", "over the best single"):
        table.add_column(column, justify="right")
    kind = None
    for row in found["rows"]:
        if kind not in (None, row["kind"]) and {kind, row["kind"]} != {"single", "chosen"}:
            table.add_section()
        kind = row["kind"]
        deltas = "" if row["deltas"] is None else str(row["deltas"])
        cells = [_value(row["tasks"][task]) for task in tasks]
        table.add_row(row["name"], deltas, *cells, _value(row["mean"]), *map(_difference, _against(row)))
    return table


def _against(row: dict[str, Any]) -> list[dict[str, Any] | None]:
    return [row["over_student"], row["over_best"]]


def _title(found: dict[str, Any]) -> str:
    methods = {item["method"] for row in found["rows"] for item in _against(row) if item}
    return f"merged deltas, per cent ± standard error; differences in points with intervals ({', '.join(methods)})"


def _value(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['stderr']:.1f}"


def _difference(item: dict[str, Any] | None) -> str:
    if item is None:
        return ""
    return f"{100 * item['difference']:+.1f} [{100 * item['low']:+.1f}, {100 * item['high']:+.1f}]"


def order_lines(found: dict[str, Any]) -> list[str]:
    """Which deltas the selection tasks put first, by seed."""
    return [
        f"seed {seed}: on the selection tasks "
        + " > ".join(f"{name} ({100 * found['validation'][name]:.1f})" for name in names)
        for seed, names in found["order"].items()
    ]
