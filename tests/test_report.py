"""The report without a browser: words follow numbers, foreign text stays text, missing parts are named."""

from __future__ import annotations

import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltaray.report import build, build_report
from deltaray.report.files import split_seed
from deltaray.report.format import Scale, duration, significant
from deltaray.report.model import Comparison, Evaluations, Measure, Model, number
from deltaray.report.pairs import CLIP, Sample, read_pairing
from deltaray.report.read import read_study
from deltaray.report.removed import read_removed
from deltaray.report.summary import claims, summarize

sys.path.insert(0, str(Path(__file__).parent / "browser"))
import report_study

SECTIONS = ("results", "training", "funnel", "deltas", "lengths", "pairs", "time", "recipe")


class Page(HTMLParser):
    """The parts of a page that a browser would act on: start tags, script contents, and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if tag == "script" and self.cdata_elem == "script":
            self.scripts[attributes.get("id") or f"code-{len(self.scripts)}"] = data
        elif self.cdata_elem is None:
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_study.build_study(tmp_path_factory.mktemp("study") / "miniature", pairs=60)


@pytest.fixture(scope="module")
def html(out: Path) -> str:
    return build_report(out).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def evaluations(*comparisons: Comparison) -> Evaluations:
    """Two models and the given claims about them."""
    models = (
        Model("delta", "student", {"sums": Measure(0.6, 0.01)}, Measure(0.6, 0.01)),
        Model("student", "untouched", {"sums": Measure(0.5, 0.01)}, Measure(0.5, 0.01)),
    )
    return Evaluations(("sums",), (0,), models, comparisons)


@pytest.mark.parametrize(
    ("low", "high", "holds", "verdict"),
    [
        (0.01, 0.2, True, "holds"),
        (-0.01, 0.2, False, "open"),
        (-0.01, 0.2, True, "open"),
        (0.01, 0.2, False, "open"),
        (-0.2, -0.01, False, "reverse"),
        (None, None, None, "unknown"),
    ],
)
def test_better_is_said_only_of_a_claim_that_holds(
    low: float | None, high: float | None, holds: bool | None, verdict: str
) -> None:
    difference = None if low is None or high is None else (low + high) / 2
    claim = claims(evaluations(Comparison("delta", "student", "mean", difference, low, high, holds, "bootstrap")))[0]
    assert claim.verdict == verdict
    assert ("better" in claim.sentence) is (verdict == "holds")


def test_summary_follows_the_numbers(tmp_path: Path) -> None:
    out = report_study.build_study(tmp_path / "study", pairs=6)
    before = summarize(read_study(out, 10))
    assert "Of 4 checked claims, 2 hold" in before and "delta over student (+8.5 points)" in before
    assert "61.3 % ± 0.8" in before and "Pairing unused came out empty" in before
    path = out / "evaluation" / "summary.json"
    content = json.loads(path.read_text())
    for entry in content["comparisons"]:
        entry |= {"difference": 0.001, "low": -0.02, "high": 0.022, "holds": False}
    content["names"]["student"]["mean"]["mean"] = 0.777
    path.write_text(json.dumps(content))
    after = summarize(read_study(out, 10))
    assert "none hold" in after and "better" not in after and "77.7 % ± 0.8" in after


def test_seeds_are_named_in_the_summary(tmp_path: Path) -> None:
    out = report_study.build_study(tmp_path / "study", pairs=2, seeds=(0, 1, 2))
    study = read_study(out, 10)
    assert "means over 3 training seeds" in summarize(study)
    assert {(run.group, run.seed) for run in study.runs if run.group == "delta"} == {("delta", i) for i in range(3)}
    curves = build._figures(study)["curves"][0].data
    assert len({trace["line"]["color"] for trace in curves if trace["meta"] == "delta"}) == 1


def test_page_has_every_section_and_number(page: Page) -> None:
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert set(SECTIONS) <= ids
    words = page.words()
    for expected in (
        "miniature",
        "73.1 % ± 1.1",
        "69.8 % ± 0.8",
        "both teachers answered",
        "2,680",
        "Not shown",
        "n = 2,000",
    ):
        assert expected in words, expected


def test_foreign_text_never_becomes_markup(html: str, page: Page) -> None:
    assert report_study.SCRIPT not in html
    assert not any("onerror" in attributes for _, attributes in page.tags)
    payload = json.loads(page.scripts["pair-data-0"])
    assert any(report_study.SCRIPT in pair["chosen"][0]["content"] for pair in payload["pairs"])
    assert any("🎉" in pair["chosen"][0]["content"] for pair in payload["pairs"])


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text('name: "<img src=x onerror=alert(1)>"\n')
    report_study.write_pairing(tmp_path, "a&b<b>", 3)
    report_study.write_run(tmp_path, 'x"<i>y', 3)
    parsed = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert not {"img", "i", "b"} & {tag for tag, _ in parsed.tags}
    assert "<img src=x onerror=alert(1)>" in parsed.words()


def test_page_is_self_contained(html: str, page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name) or ""
            assert not re.match(r"(https?:)?//", value), (tag, value)
        assert tag != "link" or attributes.get("href") == "data:,"
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style and "url(" not in style and "http" not in style
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy


def test_figures_are_valid_plotly(page: Page) -> None:
    figures = json.loads(page.scripts["figure-data"])
    assert len(figures) == 3 + 4 + 3 + 3  # scores, curves, deltas, lengths
    for figure in figures:
        assert figure["alt"] and figure["height"] > 100

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list):
                return [plain(item) for item in value]
            return "#123456" if isinstance(value, str) and value.startswith("@") else value

        go.Figure(plain(figure["data"]), plain(figure["layout"]))


def test_every_chart_colour_is_in_the_style_sheet_twice(html: str, page: Page) -> None:
    style = html[html.index("<style>") : html.index("</style>")]
    for name in set(re.findall(r'"@([a-z0-9-]+)"', page.scripts["figure-data"])):
        assert len(re.findall(rf"--{name}:", style)) == 2, name


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_colours_contrast(dark: bool) -> None:
    style = (build.HERE / "static" / "report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[dark]))
    text = [(ink, ground) for ink in ("ink", "muted", "accent") for ground in ("page", "panel", "soft")]
    text += [("good", "good-soft"), ("bad", "bad-soft"), ("ink", "mark")]
    lines = [(name, "panel") for name in ("chosen", "rejected", *(f"c{i}" for i in range(1, 9)))]
    for pairs, least in ((text, 4.5), (lines, 3.0)):
        for front, back in pairs:
            low, high = sorted([luminance(colours[front]), luminance(colours[back])])
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def test_empty_folder_says_what_produces_each_part(tmp_path: Path) -> None:
    words = Page(build_report(tmp_path).read_text(encoding="utf-8")).words()
    for command in ("evaluate", "train", "pair", "run"):
        assert f"deltaray {command} RECIPE" in words
    assert "Nothing has been produced in this folder yet." in words


@pytest.mark.parametrize("absent", ["recipe.yaml", "pairs", "training", "evaluation", ".deltaray"])
def test_one_missing_part_leaves_the_others(tmp_path: Path, absent: str) -> None:
    out = report_study.build_study(tmp_path / "study", pairs=3)
    (out / absent).rename(tmp_path / "away")
    parsed = Page(build_report(out).read_text(encoding="utf-8"))
    assert set(SECTIONS) <= {attributes.get("id") for _, attributes in parsed.tags}
    assert "RECIPE" in parsed.words()


def test_damaged_files_become_notes(tmp_path: Path) -> None:
    out = report_study.build_study(tmp_path / "study", pairs=5)
    (out / "pairs/pairing=delta/part-00009.parquet").write_bytes(b"PAR1 cut off")
    (out / "pairs/pairing=wrong/_funnel.json").write_text('[{"stage": "a"')
    (out / "evaluation/summary.json").write_text("{}")
    with (out / "training/delta/metrics.jsonl").open("a") as file:
        file.write('{"step": 151, "loss": NaN}\n{"step": 152, "lo')
    study = read_study(out, 10)
    assert len(study.notes) == 3
    assert next(p for p in study.pairings if p.name == "delta").rows == 5
    assert next(run for run in study.runs if run.name == "delta").column("loss")[-1] is None
    words = Page(build_report(out).read_text(encoding="utf-8")).words()
    assert "pairing=wrong/_funnel.json could not be read" in words and "73.1 %" in words


def test_signs_of_failure_and_held_out_pairs_are_shown(tmp_path: Path) -> None:
    out = report_study.build_study(tmp_path / "study", pairs=5)
    with (out / "training/delta/metrics.jsonl").open("a") as file:
        for step, accuracy in ((151, 0.625), (152, 0.875)):
            line = {"step": step, "loss": 0.5, "heldout_accuracy": accuracy, "signatures": ["collapse"] * (step == 152)}
            file.write(json.dumps(line) + "\n")
    run = next(run for run in read_study(out, 10).runs if run.name == "delta")
    assert run.signs == ((152, "collapse"),)
    page = build_report(out).read_text(encoding="utf-8")
    assert "delta shows signs of failure: collapse at step 152" in Page(page).words()
    assert "delta on held-out pairs: 0.625 to 0.875" in page


def test_deltas_are_shown_as_they_were_told(out: Path, page: Page) -> None:
    told = json.loads((out / "pairs/pairing=reversed/_delta.json").read_text())
    words, mean = page.words(), told["delta"]["mean"]
    numbers = [significant(mean[key]) for key in ("value", "low", "high")]
    assert "{} ({} to {})".format(*numbers) in words
    figure = next(it for it in json.loads(page.scripts["figure-data"]) if it["id"] == "delta-1")
    assert figure["data"][0]["y"] == told["delta"]["histogram"]["counts"] and sum(figure["data"][0]["y"]) == 59
    row = next(row for row in told["differences"] if row["what"] == "exact")
    assert f"exact {significant(row['chosen'])} {significant(row['rejected'])} {significant(row['effect'])}" in words
    assert "Largest delta" in words and "Most negative delta" not in words
    assert report_study.SCRIPT in words  # an example's text, as text


def test_a_pairing_that_is_not_described_says_how_to(tmp_path: Path) -> None:
    out = report_study.build_study(tmp_path / "study", pairs=5)
    (out / "pairs/pairing=delta/_delta.json").write_text('{"delta": {"mean": 3}}')
    study = read_study(out, 10)
    assert [note for note in study.notes if "pairing=delta/_delta.json could not be read" in note] == list(study.notes)
    for path in out.glob("pairs/*/_delta.json"):
        path.unlink()
    words = Page(build_report(out).read_text(encoding="utf-8")).words()
    assert "No pairing has been described yet. To produce it: deltaray pair RECIPE" in words


def test_removed_pairs_are_counted_by_rule_and_some_are_shown(out: Path, page: Page) -> None:
    payload = json.loads(page.scripts["pair-data-0"])
    assert payload["reasons"] == {f"filter {report_study.SCRIPT}": 30, "identical": 30}
    assert [row["reason"] for row in payload["removed"]].count("identical") == 5 and len(payload["removed"]) == 10
    found = read_removed(out / ".deltaray/removed/pairing=delta", 1, [])
    assert [row["reason"] for row in found.rows] == [*found.reasons] and sum(found.reasons.values()) == 60


def test_single_results_are_collected_without_a_summary(tmp_path: Path) -> None:
    for name, value in (("delta-seed0", 0.6), ("delta-seed1", 0.8), ("student", 0.5)):
        content = {
            "model": name,
            "tasks": {"sums": {"metric": "em", "value": value, "stderr": 0.1, "n": 9}},
            "mean": value,
        }
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        (tmp_path / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    found = read_study(tmp_path, 10).evaluations
    roles = {model.name: (model.role, model.tasks["sums"].mean) for model in found.models}
    assert roles == {"delta": ("student", pytest.approx(0.7)), "student": ("untouched", 0.5)}
    assert found.models[0].tasks["sums"].stderr == pytest.approx(0.1)


def test_large_pairings_are_sampled_with_a_seed(tmp_path: Path) -> None:
    report_study.write_pairing(tmp_path, "delta", 300, shards=3)
    folder = tmp_path / "pairs" / "pairing=delta"
    first, again, other = (read_pairing(folder, (), Sample(50, 10**9, seed), []) for seed in (0, 0, 1))
    ids = [pair["prompt_id"] for pair in first.pairs]
    assert first.rows == 300 and len(set(ids)) == 50 and len(first.chosen_lengths) == 300
    assert ids == sorted(ids) == [pair["prompt_id"] for pair in again.pairs]
    assert ids != [pair["prompt_id"] for pair in other.pairs]
    by_id = {row["prompt_id"]: row for row in pq.read_table(sorted(folder.glob("*.parquet"))).to_pylist()}
    assert all(by_id[pair["prompt_id"]]["answer"] == pair["answer"] for pair in first.pairs)


def test_texts_stay_within_the_budget(tmp_path: Path) -> None:
    folder = tmp_path / "pairing=long"
    folder.mkdir()
    chance = random.Random(0)
    rows = [report_study.pair(chance, "long", i) for i in range(10, 40)]
    for row in rows:
        row["chosen"][0]["content"] = "x" * (CLIP + 7)
    pq.write_table(pa.Table.from_pylist(rows, report_study.PAIRS), folder / "part.parquet")
    pairing = read_pairing(folder, (), Sample(100, 3 * CLIP + 2500), [])
    assert len(pairing.pairs) == 3 and pairing.rows == 30
    assert pairing.pairs[0]["chosen"][0]["cut"] == 7


def test_other_scores_are_not_called_right_or_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "pairs" / "pairing=size"
    folder.mkdir(parents=True)
    rows = [
        report_study.pair(random.Random(0), "size", i) | {"chosen_score": 3.0, "rejected_score": 1.5} for i in range(9)
    ]
    table = pa.Table.from_pylist(rows, report_study.PAIRS).drop_columns(["answer", "source", "chosen_sample"])
    pq.write_table(table, folder / "part.parquet")
    pairing = read_study(tmp_path, 10).pairings[0]
    assert not pairing.binary and pairing.chosen_right is None
    assert "Right answers" not in Page(build_report(tmp_path).read_text(encoding="utf-8")).words()


def test_a_failed_build_leaves_the_old_page(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = build_report(out)
    before = target.read_bytes()
    monkeypatch.setattr(build, "render", lambda study: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_report(out)
    assert target.read_bytes() == before and not list(out.glob(".report*"))


def test_numbers_read_well() -> None:
    assert [duration(seconds) for seconds in (0.04, 59.4, 61, 7384)] == [
        "0.0 s",
        "59.4 s",
        "1 min 1 s",
        "2 h 3 min",
    ]
    assert [significant(value) for value in (0.12345, -12.5, 11702.9, None)] == [
        "0.123",
        "−12.5",
        "11,703",
        "–",
    ]
    assert Scale(True).signed(-0.25) == "−25.0" and Scale(False).score(7.456) == "7.46"
    assert [number(value) for value in (1, 2.5, True, float("nan"), "3", None)] == [
        1.0,
        2.5,
        None,
        None,
        None,
        None,
    ]
    assert split_seed("delta-seed12") == ("delta", 12) and split_seed("a-seedy") == ("a-seedy", None)
