"""Status: what a study holds, what is left, and how fast it goes; reads listings, footers and error columns."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from deltaray.data.storage.filesystem import together
from deltaray.data.store import Store
from deltaray.errors import UserError, door
from deltaray.generate.staging import RETRY, failures
from deltaray.recipe import Recipe, expand, load_recipe
from deltaray.runtime.session import declared_capacity
from deltaray.runtime.terminal import Terminal
from deltaray.study.calibrate.compare import compare
from deltaray.study.plan import Item, make_plan, stages_of

RECENT = 600.0
"""Seconds: files younger than this say how fast a stage is now."""
FOLDERS = {"score": "scores", "pair": "pairs", "train": "students", "evaluate": "evaluation/responses"}
"""Where a stage commits; generation counts teacher by teacher."""

Row = dict[str, Any]


def study_status(out: str, terminal: Terminal, as_json: bool) -> None:
    """Prints the status of the study in `out`, a folder or the address of an object store.

    Raises:
        UserError: `out` is not a study's output.
    """
    store = open_study(out)
    recipe = stored_recipe(store)
    items = make_plan(expand(recipe), store, store.count_rows(Store.prompts), declared_capacity(recipe.cluster))
    stages = stages_of(items)
    teachers = [_teacher_row(store, item) for item in stages.get("generate", [])]
    rows = [_stage_row(store, stage, group, teachers) for stage, group in stages.items()]
    predicted = compare(store)
    if as_json:
        return terminal.result_json({"out": store.out, "stages": rows, "teachers": teachers, "prediction": predicted})
    title = f"{recipe.name} -> {store.out}"
    terminal.out.print(_table(title, rows, ("stage", "done", "total", "unit", "rate", "seconds_left")))
    terminal.out.print(_table("teachers", teachers, ("teacher", "done", "total", "rate", "seconds_left", "failed")))
    if predicted:
        title = "what calibration predicted for generate, with 95 % intervals, and what it took"
        terminal.out.print(_table(title, predicted, ("what", "predicted", "low", "high", "truth", "off")))


def open_study(out: str) -> Store:
    """The store of a study that is there.

    Raises:
        UserError: there is none, or it cannot be reached.
    """
    store = Store(out)
    store.check_access()
    with door(out):
        found = store.exists("recipe.yaml")
    if not found:
        raise UserError(f"{out}: is not an output folder of deltaray (there is no recipe.yaml in it)")
    return store


def stored_recipe(store: Store) -> Recipe:
    """The resolved recipe of a study, which writes to where it was found."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "recipe.yaml"
        copy.write_bytes(store.read_bytes("recipe.yaml"))
        try:
            return load_recipe(copy, [f"out={json.dumps(store.out, ensure_ascii=False)}"])
        except UserError as error:
            raise UserError(str(error).replace(str(copy), store.address("recipe.yaml"))) from None


# --- rows -------------------------------------------------------------------------------------------------------
def _teacher_row(store: Store, item: Item) -> Row:
    destination = Store.responses(item.name)
    rate = None if item.finished else _rate(store, destination)
    return {
        "teacher": item.name,
        "done": item.done,
        "total": item.total,
        "rate": rate,
        "seconds_left": _seconds_left(item.done, item.total, rate),
        "failed": _failed(store, destination),
    }


def _stage_row(store: Store, stage: str, items: list[Item], teachers: list[Row]) -> Row:
    known = all(item.total is not None for item in items)
    total = sum(item.total or 0 for item in items) if known else None
    done = sum(item.done for item in items)
    finished = all(item.finished for item in items)
    if stage == "generate":  # pools that run side by side add up; a teacher that waits has no rate yet
        rate = sum(row["rate"] or 0.0 for row in teachers) or None
    else:
        rate = _rate(store, FOLDERS[stage]) if stage in FOLDERS and not finished else None
    return {
        "stage": stage,
        "done": done,
        "total": total,
        "unit": items[0].unit,
        "rate": rate,
        "seconds_left": _seconds_left(done, total, rate),
        "finished": finished,
    }


def _seconds_left(done: int, total: int | None, rate: float | None) -> int | None:
    return round((total - done) / rate) if total is not None and rate else None


# --- how fast, and what went wrong ------------------------------------------------------------------------------
def _rate(store: Store, folder: str) -> float | None:
    """Rows (students) per second over what was committed lately, from the second commit on; None if too little was.

    Units that wait to be published tell more than published files, which appear long after their first row.
    """
    for place in (f"{Store.units}/{folder}", folder):
        suffix = "/config.json" if folder == FOLDERS["train"] else ".parquet"
        times = {path: info.mtime_ns / 1e9 for path, info in store.listing(place, suffix).items()}
        now = max(time.time(), *times.values(), 0)  # the storage's clock may be ahead of ours
        recent = sorted((path for path in times if now - times[path] < RECENT), key=times.__getitem__)
        if len(recent) > 1:
            rows = len(recent) - 1 if suffix != ".parquet" else sum(together(store.count, recent[1:]))
            return round(rows / max(now - times[recent[0]], 1.0), 2)
    return None


def _failed(store: Store, destination: str) -> dict[str, int]:
    """Failed rows by reason, in what is published and what waits; only columns that hold an error are read."""
    waiting = [path for path in store.listing(f"{Store.units}/{destination}") if f"{RETRY}/" not in path]
    files = [*store.committed(destination), *waiting]
    return failures(store, files)


# --- what the user sees -----------------------------------------------------------------------------------------
HEADINGS = {"total": "of", "rate": "per second", "seconds_left": "time left"}


def _table(title: str, rows: list[Row], keys: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for key in keys:
        table.add_column(HEADINGS.get(key, key), justify="left" if rows and _is_text(rows[0][key]) else "right")
    for row in rows:
        table.add_row(*(_cell(key, row[key]) for key in keys))
    return table


def _is_text(value: Any) -> bool:
    return isinstance(value, str | dict)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {reason}" for reason, count in value.items())
    if key == "seconds_left":
        return f"{value // 3600}:{value // 60 % 60:02d}:{value % 60:02d}"
    return f"{value:,}" if isinstance(value, int | float) else str(value)
