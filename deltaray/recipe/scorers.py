"""The recipe's scorers, told apart by `kind`: what gives every response its number. Scales differ; higher is better."""

from typing import Annotated, Literal

from pydantic import Field

from deltaray.recipe.models import Model, Section, Teacher

ASPECTS = {
    "instruction_following": "Does the response do what was asked, all of it, under every stated condition?",
    "honesty": "Does it claim only as much confidence as it can have, and admit what it does not know?",
    "truthfulness": "Is what it states correct, and free of contradictions and inventions?",
    "helpfulness": "Would the person who asked be well served: informative, clear, complete and not padded?",
}
"""What a judge rates by default, each 1 to 5."""

Statistic = Literal[
    "characters", "words", "lines", "headings", "bold", "bold_sections", "list_items", "code_blocks", "tables",
    "repetition", "distinct_words", "cjk", "refusal", "questions",
]  # fmt: skip


class _Scorer(Section):
    share: float = Field(1.0, gt=0, le=1)
    """Score this share of the prompts only: a seeded draw, the same for every teacher and scorer."""
    sources: list[str] | None = None
    """Score prompts of these sources only."""


class Size(_Scorer):
    """The size label: free, and for most pairs of teachers what a strong judge would say."""

    kind: Literal["size"]
    sizes: dict[str, float] = Field(min_length=1)
    """Teacher -> its size on any scale (billions of parameters, a rank): the score of all its responses."""


class ExactMatch(_Scorer):
    """1 where the response equals the prompt's `answer` (white space stripped), else 0."""

    kind: Literal["exact_match"]


class Numeric(_Scorer):
    """1 where the response's final number (boxed, after ####, after `the answer is`, else the last) is the answer's."""

    kind: Literal["numeric"]
    tolerance: float = Field(1e-6, ge=0)
    """Relative."""


class TokenF1(_Scorer):
    """The F1 of the words shared with `answer` (SQuAD's), or with the best of a JSON list of answers."""

    kind: Literal["token_f1"]


class MultipleChoice(_Scorer):
    """1 where the letter that the response settles on is the answer's."""

    kind: Literal["multiple_choice"]


class Json(_Scorer):
    """1 where the response, or the one fenced block in it, is valid JSON and an object with all `keys`."""

    kind: Literal["json"]
    keys: list[str] = []


class Refusal(_Scorer):
    """1 where the response refuses and the prompt's `answer` is `refuse`, or does not and it is `comply`, else 0. It
    goes by the response's opening words."""

    kind: Literal["refusal"]


class PythonTests(_Scorer):
    """The share of the tests in `answer` (a JSON list of Python sources, or one source) that the response's code
    passes, run with the standard library and without network, files or processes of its own (Linux)."""

    kind: Literal["python_tests"]
    seconds: float = Field(5.0, gt=0, le=86_400)
    """On the clock, for a program and all its tests."""
    memory_mib: int = Field(512, ge=64, le=1 << 20)
    """Besides what the interpreter takes."""


class IfEval(_Scorer):
    """The share of IFEval's instructions that the response follows; `answer` is a JSON object with
    `instruction_id_list` and `kwargs`. Needs the extra `deltaray[ifeval]`."""

    kind: Literal["ifeval"]


class Surface(_Scorer):
    """Statistics of the text alone. All are stored; one is the score, and `scorer: NAME/STATISTIC` takes another."""

    kind: Literal["surface"]
    statistic: Statistic = "characters"


class Judge(_Scorer):
    """A model that rates each response (1 to 5, the mean of its aspects), or, with `against`, compares it with another
    teacher's: 1 better, 0 worse, 0.5 where its verdict changes with the order or is a tie."""

    kind: Literal["judge"]
    by: Teacher
    """The judge: a model for the vLLM pools, or an endpoint, exactly like a teacher."""
    aspects: dict[str, str] = Field(ASPECTS, min_length=1)
    """Name -> what to look at; one question each."""
    against: str | None = None
    """A teacher, whose response to the same prompt and sample each response is compared with, in both orders; in
    evaluation tasks any model that is evaluated."""


class RewardModel(_Scorer, Model):
    """A sequence classifier with one output, as transformers loads it."""

    kind: Literal["reward_model"]
    max_length: int = Field(4096, ge=8)
    """Tokens; longer conversations lose their beginning."""
    batch_size: int = Field(16, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    workers: int = Field(1, ge=1)
    cpus: float = Field(1.0, gt=0)
    gpus: float | None = Field(None, ge=0)
    """Per worker; default: one if the cluster has GPUs."""


class Given(_Scorer):
    """The scores that a preference data set brings along."""

    kind: Literal["given"]


Scorer = Annotated[
    Size
    | ExactMatch
    | Numeric
    | TokenF1
    | MultipleChoice
    | Json
    | Refusal
    | PythonTests
    | IfEval
    | Surface
    | Judge
    | RewardModel
    | Given,
    Field(discriminator="kind"),
]


def scorer_name(reference: str) -> str:
    """The scorer of `NAME` or `NAME/PART`."""
    return reference.partition("/")[0]


def scorer_part(reference: str) -> str:
    """The part of `NAME/PART`; of `NAME` an empty text."""
    return reference.partition("/")[2]
