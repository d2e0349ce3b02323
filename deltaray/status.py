"""Status: what a study's folder holds, what is left, and how fast the running stage is."""

import json
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from deltaray.plan import Item, make_plan, stages_of
from deltaray.recipe import expand, load_recipe
from deltaray.runtime.preflight import check_study_folder
from deltaray.runtime.session import declared_capacity
from deltaray.runtime.terminal import Terminal
from deltaray.store import Store

RECENT = 600.0
"""Seconds: files younger than this say how fast a stage is now."""


def study_status(out: Path, terminal: Terminal, as_json: bool) -> None:
    """Prints the status of the study in `out`.

    Raises:
        UserError: `out` is not a study's output.
    """
    check_study_folder(out)
    recipe = load_recipe(out / "recipe.yaml", [f"out={json.dumps(str(out))}"])
    study, store = expand(recipe), Store(str(out))
    prompts = store.count_rows(Store.prompts)
    items = make_plan(study, store, prompts, declared_capacity(recipe.cluster))
    rows = [_stage_row(out, stage, group) for stage, group in stages_of(items).items()]
    if as_json:
        return terminal.result_json({"out": store.out, "stages": rows})
    table = Table(title=f"{recipe.name} -> {store.out}", title_justify="left")
    for column in ("stage", "done", "of", "unit", "per second", "time left"):
        table.add_column(column, justify="left" if column in ("stage", "unit") else "right")
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in ("stage", "done", "total", "unit", "rate", "seconds_left")))
    terminal.out.print(table)


def _stage_row(out: Path, stage: str, items: list[Item]) -> dict[str, Any]:
    known = all(item.total is not None for item in items)
    total = sum(item.total or 0 for item in items) if known else None
    done = sum(item.done for item in items)
    rate = _rate(out, items, done) if total is None or done < total else None
    left = round((total - done) / rate) if total is not None and rate else None
    return {
        "stage": stage,
        "done": done,
        "total": total,
        "unit": items[0].unit,
        "rate": rate,
        "seconds_left": left,
        "finished": all(item.finished for item in items),
    }


FOLDERS = {"generate": "responses", "pair": "pairs", "train": "students", "evaluate": "evaluation/responses"}


def _rate(out: Path, items: list[Item], done: int) -> float | None:
    """Units per second over the files committed lately; None if nothing was."""
    folder = out / FOLDERS.get(items[0].stage, "none")
    pattern = "*/config.json" if items[0].stage == "train" else "**/*.parquet"
    times = [file.stat().st_mtime for file in folder.glob(pattern)] if folder.is_dir() else []
    recent = [at for at in times if time.time() - at < RECENT]
    if not recent or not done:
        return None
    seconds = max(time.time() - min(recent), 1.0)
    return round(done * len(recent) / len(times) / seconds, 2)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int | float) else str(value)
