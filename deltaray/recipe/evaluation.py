"""The recipe's evaluation: tasks of one's own, tasks and suites of lm-evaluation-harness, claims to check."""

from typing import Any, Literal

from pydantic import Field, field_validator

from deltaray.recipe.models import Place, Sampling, Section, Seed
from deltaray.recipe.search import Search
from deltaray.recipe.source import Source


class Task(Source):
    """Prompts that every model answers, and what gives each answer its number."""

    metric: Literal["exact_match", "numeric", "token_f1", "multiple_choice", "refusal"] | None = None
    """A scorer by its kind, without settings; a task that names neither this nor `scorer` has `exact_match`."""
    scorer: str | None = None
    """In its place any of the recipe's `scorers`: `NAME`, or `NAME/PART` for one number that a score is made of."""
    sampling: Sampling = Sampling()
    search: bool = False
    """Answer in turns with searches between them (`evaluation.search`); the answer alone is scored, the turns are its
    `reasoning`."""
    k: list[int] = []
    """pass@k: the chance that one of k samples is right (score 1), estimated from `sampling.samples` of them without
    bias (2107.03374, section 2.1). The first k is the task's value, the others are reported beside it."""

    @field_validator("k")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if any(k < 1 for k in value) or len(set(value)) < len(value):
            raise ValueError("numbers of samples from 1 on, every one once")
        return value


class HarnessTask(Section):
    """One task or group of lm-evaluation-harness, with what differs from its own settings."""

    task: str | None = None
    """Its name there; default: the name that it has here."""
    num_fewshot: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)
    """Use the first so many documents only, of every task of a group."""
    metric: str | None = None
    """Which of its metrics is the task's value, as `metric` or `metric,filter`; default: a group's own aggregate, else
    the first metric that is better when higher, of the last filter. All of them are stored."""
    generation: dict[str, Any] = {}
    """Further generation settings, in the harness's words (`temperature`, `do_sample`, `max_gen_toks`, …)."""
    samples: int | None = Field(None, ge=1)
    """Answers per document (the harness's `repeats`)."""
    chat: bool | None = None
    """Overrides `harness.chat` for this task."""


class Harness(Section):
    """Tasks of lm-evaluation-harness, answered by the same vLLM pools; needs `deltaray[harness]`."""

    tasks: dict[str, HarnessTask] = {}
    include: list[Place] = []
    """Folders with YAML tasks of your own (the harness's `--include_path`)."""
    limit: int | None = Field(None, ge=1)
    """For every task that has none of its own: a look at whether it works, not a result."""
    chat: bool = True
    """Ask through the model's chat template, few-shot examples as turns before the question."""
    system: str | None = None
    unsafe_code: bool = False
    """Consent to tasks that run what models wrote on the machine, without our sandbox (HumanEval, MBPP)."""
    seed: Seed = 1234
    """Of the few-shot draws and of sampling; the harness's default."""

    def resolved(self, name: str, task: HarnessTask) -> HarnessTask:
        """A task with everything written out."""
        limit = self.limit if task.limit is None else task.limit
        chat = self.chat if task.chat is None else task.chat
        return task.model_copy(update={"task": task.task or name, "limit": limit, "chat": chat})


class Evaluation(Section):
    tasks: dict[str, Task] = {}
    suites: list[str] = []
    """Named lists of tasks with their settings (`deltaray/recipe/suites.py`); a task of your own of the same name
    wins."""
    selection: dict[str, Task] = {}
    """Tasks on which the best of a grid is chosen; they share no prompt with `tasks`."""
    harness: Harness | None = None
    search: Search | None = None
    """What tasks with `search: true` search."""
    teachers: bool = True
    """Evaluate the teachers of the pairings, too."""
    claims: list[str] = []
    """`better > worse`, each checked on the mean of the tasks and reported with its interval."""

    @property
    def harness_tasks(self) -> dict[str, HarnessTask]:
        """The harness's tasks with what the section says for all of them."""
        if self.harness is None:
            return {}
        return {name: self.harness.resolved(name, task) for name, task in self.harness.tasks.items()}

    @property
    def names(self) -> list[str]:
        """Every task that is reported."""
        return [*self.tasks, *self.harness_tasks]
