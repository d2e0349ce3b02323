"""Judges answer in the same pools as teachers: their questions are prompts, their answers are responses.

What a crash costs, how answers are spread over the cluster and how endpoints are asked is all generation's. Questions
are written slice by slice and deleted once their responses are scored; the answers stay.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow.compute as pc

from deltaray.data.contracts import PROMPTS, RESPONSES
from deltaray.data.prompts.rows import PromptRow
from deltaray.data.prompts.shards import prompt_table, shard_name, shard_of
from deltaray.data.store import Store
from deltaray.generate.answer import Work, answer, work_of
from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.generate.pools import OnRows
from deltaray.generate.stage import responses_table, seeded
from deltaray.generate.units import Assignment
from deltaray.recipe.scorers import Judge
from deltaray.recipe.study import Study
from deltaray.runtime.session import Capacity
from deltaray.runtime.stream import map_units
from deltaray.score.files import Asked, Key, Unit, read_slices, write_scores
from deltaray.score.judge import questions_of, score_of
from deltaray.score.registry import section_of
from deltaray.score.response import FAILED, JUDGE_FAILED, Score, unscored

Conversation = list[dict[str, str]]


def judge_files(
    study: Study,
    store: Store,
    units: list[Unit],
    capacity: Capacity,
    on_rows: OnRows,
    say: Callable[[str], None],
    retry_failed: bool = False,
) -> Iterator[dict[str, Any]]:
    """Has the files judged; yields what was counted in each as it is committed.

    Args:
        retry_failed: ask again what the judge failed to answer in earlier runs.
    Raises:
        StageError: too many of the judge's answers failed; what is committed stays.
    """
    for _ in map_units(units, partial(write_questions, store, study.recipe.unit_size)):
        pass
    sides = {unit["questions"]: unit for unit in units}
    for retry in (False, True)[: 1 + retry_failed]:
        works = [judge_work(store, sides[name], study.recipe.unit_size, retry) for name in sorted(sides)]
        if not all(work.finished for work in works):
            answer(store, works, capacity, responses_table, RESPONSES, study.recipe.failures, on_rows, say)
    yield from map_units(units, partial(score_judged, store))


def judge_work(store: Store, unit: Unit, unit_size: int, retry: bool) -> Work:
    """What a judge still has to answer about the responses among which a unit is."""
    judge: Judge = section_of(unit["spec"])
    name = f"{unit['scorer']} of {unit['teacher']}"
    return work_of(
        store,
        Assignment(
            name=name,
            teacher=seeded(name, judge.by),
            prompts=unit["questions"],
            destination=unit["judgements"],
            identity=identity_digest(generation_identity(judge.by)),
            unit_size=unit_size,
            retry=retry,
        ),
    )


def forget_failed(store: Store, sides: list[tuple[str, str]]) -> None:
    """Removes the files of scores in which a scorer or judge failed, so that they are made again."""
    for scorer, teacher in sides:
        for path in store.committed(Store.scores(scorer, teacher)):
            notes = store.read_table(path, ["note"])["note"]
            if any(pc.any(pc.starts_with(notes, kind)).as_py() for kind in FAILED):
                store.delete([path])


def write_questions(store: Store, unit_size: int, unit: Unit) -> dict[str, Any]:
    """Writes what the judge is asked about a file's responses, one file per slice that has none yet."""
    spec: Judge = section_of(unit["spec"])
    others = _other_texts(store, unit)
    for number, part in enumerate(read_slices(store, unit, messages=True)):
        rows = [
            PromptRow(prompt_id=name, messages=conversation, answer=None, source=None, error=None)
            for name, (_, _, conversation) in _asked(spec, part, others)[0].items()
        ]
        store.write_table(_questions_path(unit, number), prompt_table(rows), PROMPTS, row_group_size=unit_size)
    return {}


def _asked(
    spec: Judge, part: list[Asked], others: dict[Key, str]
) -> tuple[dict[str, tuple[Key, str, Conversation]], dict[Key, Score]]:
    """Every question by a name that holds its words, too: what was answered about other words does not count.

    Beside them the responses that no question can be made of.
    """
    found, refused = {}, {}
    for key, response, _ in part:
        if response is None or (spec.against is not None and key not in others):
            continue
        try:
            for name, conversation in questions_of(spec, response.messages, response.text, others.get(key)):
                words = hashlib.blake2b(conversation[-1]["content"].encode(), digest_size=8).hexdigest()
                found[f"{key[0]}#{key[1]}#{name}#{words}"] = (key, name, conversation)
        except BaseException as error:
            refused[key] = unscored(error, JUDGE_FAILED)
    return found, refused


def _questions_path(unit: Unit, number: int) -> str:
    return f"{unit['questions']}/{shard_name(unit['responses'])}-{number:05d}.parquet"


def _other_texts(store: Store, unit: Unit) -> dict[Key, str]:
    """The responses that a file's are compared with, by key; none are with themselves."""
    if unit["others"] is None:
        return {}
    columns = ["prompt_id", "sample", "text", "error"]
    table = store.read_tables(unit["others"], RESPONSES, columns, prefix=f"{shard_of(unit['responses'])}-")
    asked = (row for row in table.to_pylist() if row["error"] is None or unit["failed"])
    return {(row["prompt_id"], row["sample"]): row["text"] for row in asked}


def score_judged(store: Store, unit: Unit) -> dict[str, Any]:
    """Scores a file from the judge's answers and commits the scores; then the questions have had their day."""
    counted = write_scores(store, unit, _judged_slices(store, unit))
    prefix = f"{shard_name(unit['responses'])}-"
    questions = store.committed(unit["questions"])
    store.delete(path for path in questions if shard_name(path).startswith(prefix))
    return counted


def _judged_slices(store: Store, unit: Unit) -> Iterator[list[tuple[Key, Score]]]:
    spec: Judge = section_of(unit["spec"])
    own, others = unit["teacher"] == spec.against, _other_texts(store, unit)
    for number, part in enumerate(read_slices(store, unit, messages=True)):
        asked, refused = _asked(spec, part, others)
        answers = _answers(store, unit, shard_name(_questions_path(unit, number)), asked)
        yield [
            (key, Score(None, note) if response is None else refused.get(key) or _score(spec, answers.get(key), own))
            for key, response, note in part
        ]


def _score(spec: Judge, answers: dict[str, list[tuple[str, str | None]]] | None, own: bool) -> Score:
    if own:
        return Score(0.5, "compared with itself")
    if answers is None:
        return Score(None, "nothing to compare with")
    try:
        return score_of(spec, answers)
    except BaseException as error:
        return unscored(error, JUDGE_FAILED)


def _answers(
    store: Store, unit: Unit, shard: str, asked: dict[str, tuple[Key, str, Conversation]]
) -> dict[Key, dict[str, list[tuple[str, str | None]]]]:
    """The judge's (text, error) by response and question."""
    folder, columns = unit["judgements"], ["prompt_id", "text", "error"]
    found: dict[Key, dict[str, list[tuple[str, str | None]]]] = defaultdict(lambda: defaultdict(list))
    for row in store.read_tables(folder, RESPONSES, columns, prefix=f"{shard}-").to_pylist():
        if row["prompt_id"] in asked:
            key, name, _ = asked[row["prompt_id"]]
            found[key][name].append((row["text"], row["error"]))
    return dict(found)
