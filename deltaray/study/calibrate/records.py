"""What a calibration measured, as it is stored in `Store.calibration`."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.recipe.models import Teacher
from deltaray.recipe.study import Study


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mean(Record):
    """A measured mean and its standard error."""

    mean: float
    error: float


class Measure(Record):
    """One teacher: what a row of it costs, and how fast one replica makes its tokens."""

    identity: str
    engine: dict[str, Any]
    samples: int
    prompts: int
    rows: int
    failed: int
    prompt_tokens: Mean | None
    """Per row; null where the server does not tell."""
    tokens: Mean
    """Per row; the error is over prompts, whose samples are not independent."""
    seconds_per_token: Mean
    """Of one replica with a full batch; teachers that share weights share this, too."""
    full_batch: bool
    """Whether there were rows enough to see a full batch; else a long run is faster than predicted."""


class PoolMeasure(Record):
    """One pool, run with a single replica."""

    teachers: list[str]
    cpus: float
    """Of one replica, as `gpus`."""
    gpus: float
    replicas: int
    """The most that the real run may have."""
    stream_cpus: float
    start_seconds: float
    """From the pool's start to the first token."""
    seconds: float
    """From the pool's start to the last commit."""


class Calibration(Record):
    date: str
    prompts: int
    """In all; the measures tell how many of them were asked."""
    unit_size: int
    cpus: float
    gpus: float
    session_seconds: float
    """To start or join Ray."""
    publish_seconds: float
    pools: list[PoolMeasure]
    teachers: dict[str, Measure]
    versions: dict[str, str]
    hardware: dict[str, Any]


def write_calibration(store: Store, calibration: Calibration) -> None:
    store.write_json(Store.calibration, calibration.model_dump(mode="json"))


def read_calibration(store: Store) -> Calibration | None:
    """None if there is none.

    Raises:
        UserError: the file is not a calibration.
    """
    if not store.exists(Store.calibration):
        return None
    try:
        return Calibration.model_validate_json(store.read_bytes(Store.calibration))
    except ValueError:
        raise UserError(
            f"{store.address(Store.calibration)}: is not a calibration; delete it and calibrate again"
        ) from None


def is_current(calibration: Calibration, study: Study) -> bool:
    """Whether the study's teachers are still those that were measured, with the same engines."""
    teachers = {name: study.teachers[name] for name in study.paired_teachers()}
    return teachers.keys() == calibration.teachers.keys() and all(
        (measure.identity, measure.engine) == (identity_of(teachers[name]), engine_of(teachers[name]))
        for name, measure in calibration.teachers.items()
    )


def identity_of(teacher: Teacher) -> str:
    return identity_digest(generation_identity(teacher))


def engine_of(teacher: Teacher) -> dict[str, Any]:
    """What decides a teacher's speed."""
    section = teacher.endpoint or teacher.engine
    return section.model_dump(mode="json")
