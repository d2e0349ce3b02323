"""The stages in order: each finds what is done already, does only the rest, and says what it did.

This is the Python API behind the command line: `Pipeline(load_recipe(path)).run(["generate", "pair"])`.
"""

from contextlib import ExitStack
from datetime import date
from pathlib import Path

from deltaray.data.prompts import store_source
from deltaray.data.prompts.preferences import store_preferences
from deltaray.data.store import Store
from deltaray.errors import UserError, door
from deltaray.generate.archive import changed_teachers, supersede
from deltaray.recipe import Recipe, Study, dump_recipe, expand
from deltaray.runtime.demands import refuse_impossible
from deltaray.runtime.runner import Runner
from deltaray.runtime.session import Capacity, declared_capacity, joins_cluster, stop_ray
from deltaray.runtime.terminal import Terminal
from deltaray.study.checks import check_inputs, check_local_inputs, prompt_folder, prompt_source
from deltaray.study.definitions import DATE, definitions
from deltaray.study.plan import Item, make_plan
from deltaray.study.stages import Stages
from deltaray.study.upgrade import move_records

STAGES = ("generate", "score", "pair", "train", "merge", "evaluate", "tune", "report")
SECTIONS = {
    "score": "scorers", "pair": "pairings", "train": "training", "merge": "merging", "evaluate": "evaluation",
    "tune": "exploration",
}  # fmt: skip
"""Stages that need a section of the recipe."""


class Pipeline:
    """One study on one cluster. Ray is started when the first stage has something to do."""

    def __init__(self, recipe: Recipe, terminal: Terminal | None = None, retry_failed: bool = False) -> None:
        """`retry_failed`: generation and judges try the rows again that failed."""
        self.store, self.terminal = Store(recipe.out), terminal or Terminal()
        self.recipe = _dated(recipe, self.store)
        self.study: Study = expand(self.recipe)
        self.runner = Runner(self.study, self.store, self.terminal)
        self.stages = Stages(self.study, self.store, self.runner, retry_failed)

    # --- before anything runs ---------------------------------------------------------------------------------
    def plan(self, capacity: Capacity | None = None) -> tuple[list[Item], Capacity]:
        """What would run. Checks everything that can be checked; starts and writes nothing.

        Args:
            capacity: of the cluster that it would run on; None: what the recipe declares, or this machine.
        """
        capacity = capacity or self._declared()
        prompts = None
        if not self._family_missing():
            notes: list[str] = []
            with self.terminal.checking():
                prompts = check_local_inputs(self.study, self.store, notes.append)
            self._tell(notes)
            self._claim()
        return make_plan(self.study, self.store, prompts, capacity), capacity

    def _declared(self) -> Capacity:
        capacity = declared_capacity(self.recipe.cluster)
        if not joins_cluster(self.recipe.cluster):
            refuse_impossible(self.study, capacity)
        return capacity

    def _check(self) -> None:
        notes: list[str] = []
        with self.terminal.checking():
            check_inputs(self.study, self.store, notes.append)
        self._tell(notes)
        self._claim()

    def _tell(self, notes: list[str]) -> None:
        """What the checks found that the user should know, each thing once."""
        for note in dict.fromkeys(notes):
            self.terminal.say(note)

    def _claim(self) -> None:
        """Refuses an `out` whose artifacts come from other definitions, but for responses that may step aside."""
        self.store.check_access()
        aside = {Store.responses(name) for name in changed_teachers(self.study, self.store)}
        kept = {name: value for name, value in definitions(self.study).items() if name not in aside}
        self.store.claim(kept, write=False)

    def _family_missing(self) -> bool:
        if self.recipe.miniature is None:
            return False
        from deltaray.labs.miniature.make import family_is_made
        from deltaray.labs.smollm import ladder_is_made

        made = self.recipe.miniature
        if made.family == "smollm2":
            return not ladder_is_made(Path(made.directory))
        return not all(family_is_made(Path(made.directory), seed, made.family) for seed in self.recipe.seeds)

    # --- running ----------------------------------------------------------------------------------------------
    def run(self, stages: list[str] | None = None) -> None:
        """Runs the given stages (default: all that the recipe has sections for), in order, and stops Ray.

        A failure leaves Ray to the process: threads of the failed stage may still speak to it.

        Raises:
            UserError: the recipe or its inputs cannot work; nothing was written.
            StageError: a stage failed while running.
        """
        self._declared()
        wanted = stages or self._named_stages()
        for stage in set(wanted) - set(self._named_stages()):
            raise UserError(
                f"{self.recipe.name}: the recipe has no `{SECTIONS[stage]}:` section, so nothing to {stage}"
            )
        with ExitStack() as alone:
            self._prepare(alone)
            self._run_stages(wanted, self.runner.log_file())
        with self.terminal.checking():  # processes complain while they are ended
            stop_ray()

    def _prepare(self, alone: ExitStack) -> None:
        """The family of a miniature; then all checks; then, and not before, the first file of the study.

        `alone` holds the lock on `out` from then on.
        """
        if self.recipe.miniature and self._family_missing():
            self._run_stages(["miniature"], Path(self.recipe.miniature.directory) / "make.log")
        self._check()
        if joins_cluster(self.recipe.cluster):
            self.runner.ray()
        alone.enter_context(self.store.lock())
        self.store.sweep()
        move_records(self.store)
        self._write_recipe()

    def _run_stages(self, stages: list[str], log: Path) -> None:
        with self.terminal.chatter_to(log):
            for stage in stages:
                self.runner.guarded(stage, getattr(self.stages, stage), log)

    def _named_stages(self) -> list[str]:
        return [stage for stage in STAGES if stage not in SECTIONS or getattr(self.recipe, SECTIONS[stage])]

    def _write_recipe(self) -> None:
        try:
            supersede(self.study, self.store)
            self.store.claim(definitions(self.study))
            self.store.write_bytes("recipe.yaml", dump_recipe(self.recipe).encode())
            self._store_prompts()
        except OSError as error:
            raise UserError(f"out: {self.store.out} cannot be written: {error.strerror or error}") from None
        self.runner.bound = True
        self.runner.keep_records()

    def _store_prompts(self) -> None:
        sizes = self.recipe.shard_size, self.recipe.unit_size
        if self.recipe.preferences:
            return store_preferences(self.store, self.recipe.preferences, *sizes)
        store_source(self.store, prompt_source(self.study), *sizes, prompt_folder(self.study))


def _dated(recipe: Recipe, store: Store) -> Recipe:
    """The recipe with its day: the one that it names, or the one of the first command on this `out`."""
    if recipe.date is not None:
        return recipe
    store.check_access()
    kept = store.definition(DATE)
    with door(f"{store.out}: its definition of the date", "is damaged"):
        day = date.fromisoformat(kept["date"]) if kept else date.today()
    return recipe.model_copy(update={"date": day.isoformat()})
