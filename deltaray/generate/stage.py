"""Generate: every teacher answers every prompt once, each with its own chat template and its own pool."""

import zlib
from collections.abc import Callable

import pyarrow as pa

from deltaray.data.contracts import RESPONSES
from deltaray.data.store import Store
from deltaray.generate.answer import Work, answer, work_of
from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.generate.pools import OnRows, error_of
from deltaray.generate.units import Assignment, Unit
from deltaray.recipe.models import Teacher
from deltaray.recipe.study import Study
from deltaray.runtime.session import Capacity


def teacher_work(study: Study, store: Store, retry: bool = False) -> list[Work]:
    """What the teachers that a pairing uses still have to answer; with `retry` what they failed to answer."""
    return [work_of(store, _assignment(study, name, retry)) for name in study.paired_teachers()]


def _assignment(study: Study, name: str, retry: bool) -> Assignment:
    teacher = study.teachers[name]
    return Assignment(
        name=name,
        teacher=seeded(name, teacher),
        prompts=Store.prompts,
        destination=Store.responses(name),
        identity=identity_digest(generation_identity(teacher)),
        unit_size=study.recipe.unit_size,
        retry=retry,
    )


def seeded(name: str, teacher: Teacher) -> Teacher:
    """The teacher with its name in its seed.

    Two teachers that draw with the same random numbers would give the same answers wherever they agree on the likely
    ones, and identical pairs teach nothing.
    """
    if teacher.sampling.seed is None:
        return teacher
    seed = zlib.crc32(f"{name}#{teacher.sampling.seed}".encode())
    return teacher.model_copy(update={"sampling": teacher.sampling.model_copy(update={"seed": seed})})


def generate(
    study: Study, store: Store, works: list[Work], capacity: Capacity, on_rows: OnRows, say: Callable[[str], None]
) -> None:
    """Completes the responses of the teachers (`teacher_work`).

    Raises:
        StageError: too many of a teacher's responses failed; what is committed stays.
    """
    answer(store, works, capacity, responses_table, RESPONSES, study.recipe.failures, on_rows, say)


def responses_table(unit: Unit) -> pa.Table:
    """The rows of an answered unit, samples innermost. Pure."""
    answered = [
        (place, sample, output)
        for place, outputs in enumerate(unit["outputs"])
        for sample, output in zip(unit["samples"], outputs, strict=True)
    ]
    outputs = [output for _, _, output in answered]
    columns = {
        "prompt_id": [unit["prompt_ids"][place] for place, _, _ in answered],
        "sample": [sample for _, sample, _ in answered],
        "text": [output["text"] for output in outputs],
        "reasoning": [output["reasoning"] for output in outputs],
        "prompt_token_ids": [unit["token_ids"][place] for place, _, _ in answered],
        "token_ids": [output["token_ids"] for output in outputs],
        "tokens": [output["tokens"] for output in outputs],
        "finish_reason": [output["finish_reason"] for output in outputs],
        "error": [error_of(output) for output in outputs],
    }
    return pa.Table.from_pydict(columns, schema=RESPONSES)
