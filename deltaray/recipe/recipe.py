"""The recipe as one typed model: every top-level key a user may write."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from deltaray.recipe.evaluation import Evaluation
from deltaray.recipe.exploration import Exploration
from deltaray.recipe.extensions import Extensions
from deltaray.recipe.merging import Merging
from deltaray.recipe.models import Day, Place, Section, Seed, Student, Teacher
from deltaray.recipe.pairing import Pairing
from deltaray.recipe.scorers import Scorer
from deltaray.recipe.source import COLUMNS, Source
from deltaray.recipe.training import Training

Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Prompts(Source):
    duplicates: Literal["refuse", "drop"] = "refuse"
    """What to do with a second row of the same id or text: hub data sets often repeat prompts."""


class Preferences(Source):
    """An existing preference data set: its prompts, and its two sides as teachers who have answered already.

    In the forms of `Source`, with `chosen` and `rejected` as texts or conversations, and `prompt` where these do not
    begin with it. Also read: `system`, `source`, `answer`, `tools`, and the sides' scores.
    """

    names: ClassVar[tuple[str, ...]] = (
        *(name for name in COLUMNS if name != "messages"),
        *("chosen", "rejected", "chosen_score", "rejected_score"),
    )
    chosen: str = "chosen"
    rejected: str = "rejected"
    """How pairings call the two sides."""


class Miniature(Section):
    """Makes a family of models, its prompts and its evaluation before anything else (once; then cached)."""

    directory: Place = "runs/miniature-family"
    family: Literal["ladder", "specialists", "landscape", "qwen3", "earlier", "sections", "strings", "smollm2"] = (
        "ladder"
    )
    """`ladder`: teachers of growing size and care; `specialists`: each careful in another part of the task;
    `landscape`: the ladder with a fifth teacher; the others serve the controlled experiments. Those of another task
    (`sections`, `strings`) take a directory of their own. `smollm2` is not a toy: SmolLM2-135M-Instruct, fetched from
    the Python index, and two weaker selves, the same for every seed; it needs `deltaray[real]`."""


class Failures(Section):
    """When rows that fail end a stage. All rows of a teacher that fail always do."""

    max_share: float = Field(0.2, ge=0, le=1)
    """Largest tolerated share of a teacher's rows that fail (prompt too long, empty answer, engine error), and of the
    scores that a scorer or judge fails to give. At the end of a stage it counts however few rows there are."""
    after: int = Field(256, ge=1)
    """Rows of a teacher before the share ends a stage that is under way."""


class Cluster(Section):
    address: str | None = None
    """Of a running Ray cluster (`auto`, `host:port`, `ray://…`); none: Ray is started on this machine."""
    cpus: int | None = Field(None, ge=1)
    """Logical CPUs of the Ray that is started here; default: the machine's, at least 8 (workers mostly wait)."""
    gpus: int | None = Field(None, ge=0)
    dashboard: bool = False
    gpu_hour_price: float | None = Field(None, ge=0)
    """For estimates of cost, in any currency."""


class Recipe(Section):
    name: str = Name
    out: Place
    seeds: list[Seed] = Field([0], min_length=1)
    date: Day | None = None
    """The day that chat templates take for today (YYYY-MM-DD); default: the day of the first command, kept in `out`."""
    shard_size: int = Field(32768, ge=1)
    """Prompts per shard: every table has one file per shard (about 150 MiB of ordinary answers)."""
    unit_size: int = Field(256, ge=1)
    """Prompts per unit of generation: what is committed at once, and the most that one crash costs per unit in
    flight."""
    failures: Failures = Failures()
    prompts: Prompts | None = None
    preferences: Preferences | None = None
    """In place of `prompts`; then `teachers` may be left out."""
    extensions: Extensions | None = None
    """Prompts of one turn that become conversations before the teachers answer."""
    teachers: dict[str, Teacher] = {}
    scorers: dict[str, Scorer] = {}
    pairings: dict[str, Pairing] = {}
    student: Student | None = None
    training: Training | None = None
    merging: Merging | None = None
    evaluation: Evaluation | None = None
    exploration: Exploration | None = None
    miniature: Miniature | None = None
    cluster: Cluster = Cluster()

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("every seed once")
        return value

    @property
    def answering(self) -> list[str]:
        """Everybody whose responses can be paired: the teachers, and the sides of a preference data set."""
        given = self.preferences
        return [*self.teachers, *([given.chosen, given.rejected] if given else [])]
