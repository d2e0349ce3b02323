"""Puts the page together: one file with its styles, scripts, figures and pairs inside."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from deltaray.data.storage.files import Files
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.text import known_secrets

from . import aggregation, charts, comparisons, deltas, landscape, merging, series, tables, theory
from .model import Pairing, Study
from .read import read_study
from .remote import local_copy, state_of
from .summary import summarize

HERE = Path(__file__).parent
MAX_PAIRS = 2000
"""Pairs per pairing that a page embeds."""


def build_report(out: Path) -> Path:
    """Write `out/report.html` from what `out` holds so far; a reader never sees half a file."""
    return Path(write_report(Store(str(out))))


def write_report(store: Store) -> str:
    """Write `report.html` from what the store holds so far and return its full name.

    Raises:
        StageError: the disk is full.
    """
    state = state_of(store)
    with local_copy(store) as out:
        page = without_keys(render(read_study(out, MAX_PAIRS)))
    store.write_bytes(Store.report, page.encode("utf-8", errors="replace"))
    store.write_json(Store.reported, {"state": state})
    return store.address(Store.report)


def without_keys(page: str) -> str:
    """The page without secrets of the environment: what an older version has stored may hold one."""
    for secret in known_secrets():
        for form in (secret, json.dumps(secret)[1:-1], html.escape(secret)):
            page = page.replace(form, "[key]")
    return page


def is_reported(store: Store) -> bool:
    """Whether the page is there and tells of the files that are there now."""
    there = store.exists(Store.report) and store.exists(Store.reported)
    with suppress(UserError):  # a damaged record: the page is written again
        return there and store.read_json(Store.reported, {"state": str})["state"] == state_of(store)
    return False


def render(study: Study) -> str:
    """The page's HTML."""
    scripts = [get_plotlyjs(), *(_static(name) for name in ("charts.js", "pairs.js", "tables.js"))]
    figures = _figures(study)
    merge_figures = [merging.merge_charts(merge, position) for position, merge in enumerate(study.merges)]
    figures["merging"] = [figure for group in merge_figures for figure in group]
    return _template("report.html.j2").render(
        study=study,
        merging=merging,
        merge_figures=merge_figures,
        tables=tables,
        deltas=deltas,
        landscape=landscape,
        aggregation=aggregation,
        comparisons=comparisons,
        summary=summarize(study),
        palette=_palette(study),
        figures=figures,
        figure_data=embedded([vars(chart) for group in figures.values() for chart in group]),
        pair_data=[embedded(_pair_payload(pairing)) for pairing in study.pairings],
        style=Markup(_static("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )


def write_merge_page(folder: Path) -> Path:
    """Write `merge.html` beside a merged adapter's `merge.json`: its diagnosis, as self-contained as a report.

    Raises:
        StageError: the disk is full.
    """
    merge = merging.read_merge(folder.resolve() / "merge.json")
    figures = merging.merge_charts(merge, 0)
    context = {"merging": merging, "merges": [merge], "merge_figures": [figures]}
    return _write_page(folder, "merge.html", figures, context)


def write_theory_page(folder: Path) -> Path:
    """Write `theory.html` beside `theory.json`, as self-contained as a report.

    Raises:
        StageError: the disk is full.
    """
    record = json.loads((folder / "theory.json").read_text(encoding="utf-8"))
    figures = theory.theory_charts(record)
    return _write_page(folder, "theory.html", figures, {"theory": theory, "record": record, "figures": figures})


def _write_page(folder: Path, name: str, figures: list[charts.Chart], context: dict[str, Any]) -> Path:
    """A page of its own, made of the template of its name, with its figures drawn by charts.js."""
    scripts = [get_plotlyjs(), _static("charts.js")]
    page = _template(f"{name}.j2").render(
        **context,
        figure_data=embedded([vars(chart) for chart in figures]),
        style=Markup(_static("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )
    Files(str(folder)).write_bytes(name, page.encode("utf-8", errors="replace"))
    return folder / name


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def embedded(value: Any) -> Markup:
    """JSON that cannot end or reopen its script element: every `<` is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _static(name: str) -> str:
    return (HERE / "static" / name).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    """A content policy: only the page's own scripts run, nothing is fetched from anywhere."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _palette(study: Study) -> dict[str, str]:
    """Colours for every trained student, evaluated or not."""
    evaluated = [model.name for model in study.evaluations.with_role("student")]
    return charts.colours([*evaluated, *(run.group for run in study.runs)])


def _figures(study: Study) -> dict[str, list[charts.Chart]]:
    """The charts of each section."""
    palette = _palette(study)
    return {
        "scores": charts.score_charts(study.evaluations, palette) if study.evaluations.models else [],
        "curves": series.curve_charts(study.runs, palette) if study.runs else [],
        "deltas": [
            deltas.delta_chart(pairing, position)
            for position, pairing in enumerate(study.pairings)
            if pairing.delta and pairing.delta["scored"]
        ],
        "exploration": _landscape(study),
        "lengths": [
            series.length_chart(pairing, position)
            for position, pairing in enumerate(study.pairings)
            if pairing.chosen_lengths.size or pairing.rejected_lengths.size
        ],
    }


def _landscape(study: Study) -> list[charts.Chart]:
    found = study.exploration.landscape if study.exploration else None
    return [landscape.landscape_chart(found)] if found and found["points"] else []


def _pair_payload(pairing: Pairing) -> dict[str, Any]:
    """What the pair browser needs of one pairing."""
    removed = {"removed": pairing.removed_rows, "reasons": pairing.removed}
    return {"name": pairing.name, "rows": pairing.rows, "binary": pairing.binary, "pairs": pairing.pairs, **removed}
