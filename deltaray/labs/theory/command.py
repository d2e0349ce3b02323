"""`deltaray theory`: runs the experiment, stores it, and shows a summary on stdout."""

from pathlib import Path
from typing import Any

from rich.table import Table

from deltaray.data.storage.files import Files
from deltaray.errors import UserError
from deltaray.labs.theory.experiment import Asked, run_theory
from deltaray.runtime.terminal import Terminal


def theory_command(terminal: Terminal, asked: Asked, out: Path, as_json: bool) -> None:
    """Writes theory.json and theory.html into `out`.

    Raises:
        UserError: `out` is a file.
    """
    from deltaray.report.build import write_theory_page

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    with terminal.progress("theory", "done") as view:
        record = run_theory(asked, lambda what, done, total: view.update(what, done, total))
    Files(str(out)).write_json("theory.json", record)
    page = write_theory_page(out)
    if as_json:
        return terminal.result_json(record)
    for table in tables(record):
        terminal.out.print(table)
    terminal.result(f"numbers: {out / 'theory.json'}")
    terminal.result(f"picture: {page}")


def tables(record: dict[str, Any]) -> list[Table]:
    """The simulation beside the closed form, and who gains in which dimension."""
    from deltaray.report.theory import dimension_rows, summary_rows

    setting = record["setting"]
    title = (
        f"student {setting['student']:g}, chosen {setting['chosen']:g}, rejected {setting['rejected']:g}: cosines to "
        f"the truth in {setting['dimension']:,} dimensions, {setting['draws']} draws"
    )
    both = _table(title, ("", "simulated", "closed form"), summary_rows(record))
    columns = ("dimension", "first step gains (closed form)", "better at the best point", "gain there", "closed form")
    return [both, _table("by dimension", columns, dimension_rows(record))]


def _table(title: str, columns: tuple[str, ...], rows: list[Any]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*row)
    return table
