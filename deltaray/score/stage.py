"""Score: every stored response once by every scorer, one file of scores per file of responses."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow.compute as pc

from deltaray.data.prompts.shards import shard_name
from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.generate.pools import AGAIN, OnRows
from deltaray.recipe.recipe import Failures
from deltaray.recipe.scorers import Judge, scorer_name
from deltaray.recipe.study import Study
from deltaray.runtime.session import Capacity
from deltaray.runtime.stream import map_units
from deltaray.runtime.tally import Tally, broken
from deltaray.score.attempts import Attempts
from deltaray.score.files import AT_ONCE, Key, Scoring, Unit, missing_units, read_slices, write_scores
from deltaray.score.registry import SCORERS, section_of
from deltaray.score.response import FAILED, NOT_ASKED, UNPARSABLE, Score

REMEDY = (
    "fix the cause and run `deltaray score RECIPE --retry-failed`, which scores again what failed, or raise "
    "failures.max_share"
)
Side = tuple[str, str]
"""(scorer, teacher)."""


def needed_scores(study: Study) -> list[Side]:
    """What the pairings ask for."""
    sides = {
        (scorer_name(reference), teacher)
        for pairing in study.pairings.values()
        for reference in pairing.scorers
        for teacher in pairing.names
    }
    return sorted(sides)


def all_scores(study: Study) -> list[Side]:
    """Every scorer on every teacher that some pairing uses, but for those that only evaluation tasks name."""
    return [(scorer, teacher) for scorer in study.response_scorers() for teacher in study.answering()]


def missing_scores(study: Study, store: Store, sides: list[Side] | None = None) -> list[Unit]:
    """One unit per responses file that a scorer has not scored yet; its scores file has the same name."""
    wanted = needed_scores(study) if sides is None else sides
    return [unit for side in wanted for unit in missing_units(store, response_scoring(study, *side))]


def response_scoring(study: Study, scorer: str, teacher: str) -> Scoring:
    """A scorer of a teacher's responses."""
    spec = study.scorers[scorer]
    against = spec.against if isinstance(spec, Judge) else None
    return Scoring(
        scorer=scorer,
        spec=spec.model_dump(mode="json"),
        teacher=teacher,
        prompts=Store.prompts,
        responses=Store.responses(teacher),
        destination=Store.scores(scorer, teacher),
        questions=Store.questions(scorer, teacher),
        judgements=Store.judgements(scorer, teacher),
        others=None if against in (None, teacher) else Store.responses(str(against)),
    )


def score(
    study: Study,
    store: Store,
    sides: list[Side] | None = None,
    capacity: Capacity | None = None,
    on_rows: OnRows = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    retry_failed: bool = False,
) -> int:
    """Completes the scores of `sides` (default: what the pairings ask for); returns how many responses were looked at.

    Args:
        on_rows: progress as (scorer and teacher, responses done, responses in all, 0, how many had no score).
        retry_failed: judges are asked again what they failed to answer.
    """
    units = missing_scores(study, store, sides)
    return score_units(study, store, units, capacity or Capacity(0, 0), on_rows, say, retry_failed)


def score_units(
    study: Study,
    store: Store,
    units: list[Unit],
    capacity: Capacity,
    on_rows: OnRows,
    say: Callable[[str], None],
    retry_failed: bool = False,
) -> int:
    """As `score`, for files of responses from anywhere: teachers, or models that are evaluated."""
    totals: dict[str, int] = {}
    for unit in units:
        name = _shown(unit)
        totals[name] = totals.get(name, 0) + store.count(unit["responses"])
    done, failed = dict.fromkeys(totals, 0), dict.fromkeys(totals, 0)
    for result in _results(study, store, units, capacity, on_rows, say, retry_failed):
        name = _shown(result)
        done[name] += result["rows"]
        for note, count in result["unscored"].items():
            failed[name] += count if note in FAILED else 0
        note = f"{failed[name]:,} failed" if failed[name] else ""
        on_rows(name, done[name], totals[name], 0, note)
    return sum(done.values())


def refuse_unscored(
    store: Store, folders: dict[str, str], failures: Failures, say: Callable[[str], None], again: bool = False
) -> None:
    """Says at what the scorers failed, of all scores that are stored.

    Args:
        folders: of scores, by what is shown of scorer and teacher.
        again: what was failed at too often is forgotten, so that the same command does it again.
    Raises:
        StageError: a scorer failed at too large a share of what it was asked, or could read none of its judge's words.
    """
    share = failures.max_share
    tallies = {folder: _tally(store, name, folder) for name, folder in folders.items()}
    too_many = {folder: tally for folder, tally in tallies.items() if tally.is_too_much(share)}
    if too_many:
        if again:
            store.delete([path for folder in too_many for path in store.committed(folder)])
        raise StageError(broken(list(too_many.values()), share, AGAIN if again else REMEDY))
    for tally in tallies.values():
        if tally.failed:
            say(tally.line())


def _tally(store: Store, name: str, folder: str) -> Tally:
    """Responses that were to be scored, and those without a score for which the scorer is to blame.

    What a judge said and nobody can read counts only where there is nothing else.
    """
    tally, unread = Tally(name, "scores"), Tally(name, "scores")
    for path in store.committed(folder):
        table = store.read_table(path, ["score", "note"])
        blank = table.filter(pc.is_null(table["score"]))["note"].drop_null()
        counts = {it["values"]: it["counts"] for it in blank.value_counts().to_pylist()}
        skipped = sum(count for note, count in counts.items() if _kind(note) in NOT_ASKED)
        for kinds, of in ((FAILED, tally), ((*FAILED, UNPARSABLE), unread)):
            there = {note: count for note, count in counts.items() if _kind(note) in kinds}
            of.add(len(table) - skipped, sum(there.values()), there)
    return unread if unread.failed == unread.rows else tally


def _kind(note: str) -> str:
    return note.partition(":")[0]


def _shown(item: dict[str, Any]) -> str:
    return f"{item['scorer']} {item['teacher']}"


def _results(
    study: Study,
    store: Store,
    units: list[Unit],
    capacity: Capacity,
    on_rows: OnRows,
    say: Callable[[str], None],
    retry_failed: bool,
) -> Iterator[dict[str, Any]]:
    judged = [unit for unit in units if unit["spec"]["kind"] == "judge"]
    rewarded = [unit for unit in units if unit["spec"]["kind"] == "reward_model"]
    yield from map_units([unit for unit in units if unit not in judged + rewarded], partial(score_file, store))
    if rewarded:
        from deltaray.score.rewards import reward_files

        yield from reward_files(store, rewarded, capacity)
    if judged:
        from deltaray.score.judging import judge_files

        yield from judge_files(study, store, judged, capacity, on_rows, say, retry_failed)


def score_file(store: Store, unit: Unit) -> dict[str, Any]:
    """Scores one file of responses by a function and commits the scores."""
    if unit["spec"]["kind"] == "given":
        return write_scores(store, unit, _given(store, unit))
    function = SCORERS[unit["spec"]["kind"]](section_of(unit["spec"]))
    # only what an instruction speaks about needs the conversation before the response
    slices = read_slices(store, unit, messages=unit["spec"]["kind"] == "ifeval")

    attempts = Attempts(store, unit)

    def all_scored() -> Iterator[list[tuple[Key, Score]]]:
        for part in slices:
            yield [
                (key, Score(None, note) if it is None else attempts.scored(function, key, it)) for key, it, note in part
            ]

    try:
        return write_scores(store, unit, all_scored())
    finally:
        attempts.over()


def _given(store: Store, unit: Unit) -> Iterator[list[tuple[Key, Score]]]:
    """What a preference data set says of its own responses."""
    path = f"{Store.given(unit['teacher'])}/{shard_name(unit['responses'])}.parquet"
    if not store.exists(path):
        rows = store.read_table(unit["responses"], ["prompt_id", "sample"]).to_pylist()
        yield [((row["prompt_id"], row["sample"]), Score(None, "no score given")) for row in rows]
        return
    for batch in store.read_table(path, ["prompt_id", "sample", "score"]).to_batches(AT_ONCE):
        yield [
            (
                (row["prompt_id"], row["sample"]),
                Score(row["score"], None if row["score"] is not None else "no score given"),
            )
            for row in batch.to_pylist()
        ]
