"""Plan: what each stage will run, where, and how much of it is done already. Starts nothing."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from deltaray.data.store import Store
from deltaray.evaluate.stage import all_tasks
from deltaray.generate.extend.stage import is_extended
from deltaray.generate.staging import rows_done
from deltaray.pair.stage import is_paired
from deltaray.recipe.models import Student, Teacher
from deltaray.recipe.study import AdapterMerge, Study, TrainingRun
from deltaray.runtime.session import Capacity
from deltaray.text.words import exact


@dataclass(frozen=True)
class Item:
    """One thing that a stage makes."""

    stage: str
    name: str
    unit: str
    total: int | None  # None: not known before an earlier stage has run
    done: int
    where: str

    @property
    def finished(self) -> bool:
        return self.total is not None and self.done >= self.total


def make_plan(study: Study, store: Store, prompts: int | None, capacity: Capacity) -> list[Item]:
    """All items of all stages that the recipe names, in the order in which they run.

    Args:
        prompts: how many prompts the recipe's file holds; None if it does not exist yet.
    """
    items = extension_items(study, store, capacity)
    items += generation_items(study, store, prompts, capacity)
    items += [_scoring_item(study, store, name, items) for name in study.response_scorers()]
    items += [_pairing_item(study, store, name) for name in study.pairings]
    items += [_training_item(study, store, run, capacity) for run in study.runs.values()]
    items += [_merging_item(store, merge) for merge in study.merges.values()]
    items += evaluation_items(study, store, capacity)
    items += _exploration_items(study, store, capacity)
    report = int(store.exists("report.html"))
    return [*items, Item("report", "report.html", "file", 1, report, "driver")]


def extension_items(study: Study, store: Store, capacity: Capacity) -> list[Item]:
    """Conversations by kind; how many there will be is known once they are drawn."""
    section, items = study.extensions, list[Item]()
    if section is None:
        return items
    for kind in section.kinds:
        drawn = bool(store.committed(Store.drawn(kind)))
        total = store.count_rows(Store.drawn(kind)) if drawn else None
        done = rows_done(store, Store.extended(kind))
        items.append(Item("extend", kind, "conversations", total, done, _place(section.by, capacity)))
    return items


def generation_items(study: Study, store: Store, prompts: int | None, capacity: Capacity) -> list[Item]:
    items = []
    if study.extensions:  # what is dropped is known afterwards
        prompts = store.count_rows(Store.prompts) if is_extended(study, store) else None
    for name in study.paired_teachers():
        teacher = study.teachers[name]
        total = None if prompts is None else prompts * teacher.sampling.samples
        stored = rows_done(store, Store.responses(name))
        done = stored if total is None else min(stored, total)  # an earlier recipe may have asked for more samples
        items.append(Item("generate", name, "responses", total, done, _place(teacher, capacity)))
    return items


def _place(model: Teacher | Student, capacity: Capacity) -> str:
    """Where a model answers."""
    endpoint = model.endpoint if isinstance(model, Teacher) else None
    if endpoint is not None:
        return f"{endpoint.url}, {endpoint.in_flight} requests at once"
    engine = model.engine
    most = engine.max_replicas or engine.replicas
    count = str(engine.replicas) if most == engine.replicas else f"{engine.replicas}-{most}"
    gpus = capacity.gpus_of(engine)
    return f"{count} x vLLM, " + (f"{gpus:g} GPU each" if gpus else f"{engine.cpus:g} CPU each")


def _scoring_item(study: Study, store: Store, name: str, generated: list[Item]) -> Item:
    """All responses of all teachers, by one scorer."""
    totals = [item.total for item in generated if item.stage == "generate"]
    stored = sum(store.count_rows(Store.responses(teacher)) for teacher in study.answering())
    total = None if None in totals else max(stored, sum(total or 0 for total in totals))
    done = sum(store.count_rows(Store.scores(name, teacher)) for teacher in study.answering())
    scorer = study.scorers[name]
    where = f"{scorer.kind}, " + ("vLLM or endpoint" if scorer.kind == "judge" else "CPU tasks")
    if scorer.kind == "reward_model":
        where = f"reward_model, {scorer.workers} workers"
    return Item("score", name, "scores", total, done, where)


def _pairing_item(study: Study, store: Store, name: str) -> Item:
    pairing = study.pairings[name]
    done = is_paired(study, store, name)
    pairs = store.count_rows(Store.pairs(name)) if done else None
    what = f"{pairing.chosen} > {pairing.rejected}"
    if pairing.policy != "by_sample":
        what = f"{pairing.policy.replace('_', ' ')} of {len(pairing.teachers)} teachers"
    return Item("pair", name, "pairs", pairs, pairs or 0, f"{what}, CPU tasks")


def _training_item(study: Study, store: Store, run: TrainingRun, capacity: Capacity) -> Item:
    training = study.recipe.training
    assert training is not None
    gpus = capacity.gpus_per_worker(training.gpus_per_worker)
    each = f"{gpus} GPU" if gpus else f"{training.cpus_per_worker:g} CPU"
    settings = run.settings
    rate = f"lr {exact(settings.learning_rate)}" if isinstance(settings.learning_rate, float) else ""
    where = f"{settings.loss}, {rate}, {training.workers} workers, {each} each, ZeRO-{training.zero_stage}"
    if settings.lora:
        from deltaray.train.check import targets_said

        where += ", LoRA" + targets_said(study.students[run.student], settings.lora)
    where += f", after {run.after}" if run.after else ""
    return Item("train", run.name, "students", 1, int(store.trained(run.name) is not None), where)


def _merging_item(store: Store, merge: AdapterMerge) -> Item:
    where = f"{merge.method}, the best {merge.count} of {len(merge.deltas)} adapters, driver"
    return Item("merge", merge.name, "adapters", 1, int(store.trained(merge.name) is not None), where)


def evaluation_items(study: Study, store: Store, capacity: Capacity) -> list[Item]:
    evaluation, student = study.recipe.evaluation, study.recipe.student
    if evaluation is None:
        return []
    sizes = {name: _task_rows(store, name, task.sampling.samples) for name, task in all_tasks(study).items()}
    names = {model.name: list(evaluation.tasks) for model in study.evaluated.values() if not study.grid(model.name)}
    names |= {run: [*evaluation.tasks, *tasks] for run in study.runs if (tasks := study.selected_on(run))}
    items = []
    for name, tasks in names.items():
        model = study.teachers.get(name) or student
        assert model is not None
        total = None if any(sizes[task] is None for task in tasks) else sum(sizes[task] or 0 for task in tasks)
        done = sum(rows_done(store, Store.evaluation_responses(name, task)) for task in tasks)
        if tasks:
            items.append(Item("evaluate", name, "answers", total, done, _place(model, capacity)))
    return items + _benchmark_items(study, store, capacity)


def _benchmark_items(study: Study, store: Store, capacity: Capacity) -> list[Item]:
    """Tasks of lm-evaluation-harness by model; a model behind an endpoint does none."""
    evaluation, student = study.recipe.evaluation, study.recipe.student
    tasks = list(evaluation.harness_tasks) if evaluation else []
    items = []
    for name in study.evaluated if tasks else ():
        model = study.teachers.get(name) or student
        assert model is not None
        if isinstance(model, Student) or model.endpoint is None:
            done = sum(store.exists(Store.sample_results(name, task)) for task in tasks)
            where = f"{', '.join(tasks)}; {_place(model, capacity)}"
            items.append(Item("evaluate", name, "benchmarks", len(tasks), done, where))
    return items


def _exploration_items(study: Study, store: Store, capacity: Capacity) -> list[Item]:
    if study.recipe.exploration is None:
        return []
    from deltaray.tune.shared import count_of
    from deltaray.tune.stage import Explorer

    explorer = Explorer(study, store)
    done, search = len(explorer.over(retry_failed=False)), study.recipe.exploration.search
    seeds = f", {len(study.recipe.seeds)} seeds each" if len(study.recipe.seeds) > 1 else ""
    where = f"{search}{seeds}, {explorer.room(capacity)}"
    return [Item("tune", "exploration", "trials", count_of(study), done, where)]


def _task_rows(store: Store, task: str, samples: int) -> int | None:
    folder = Store.evaluation_prompts(task)
    if not store.committed(folder):
        return None
    return store.count_rows(folder) * samples


def stages_of(items: list[Item]) -> dict[str, list[Item]]:
    """Items by stage, in order."""
    stages: dict[str, list[Item]] = {}
    for item in items:
        stages.setdefault(item.stage, []).append(item)
    return stages


def plan_json(study: Study, store: Store, items: list[Item], capacity: Capacity) -> dict[str, Any]:
    """The plan for machines."""
    return {
        "recipe": study.recipe.name,
        "out": store.out,
        "seeds": list(study.recipe.seeds),
        "cluster": asdict(capacity),
        "stages": [
            {
                "stage": stage,
                "finished": all(item.finished for item in group),
                "items": [asdict(item) for item in group],
            }
            for stage, group in stages_of(items).items()
        ],
    }


def plan_table(items: list[Item], title: str) -> Table:
    """The items as a terminal shows them."""
    table = Table(title=title, title_justify="left")
    for column in ("stage", "what", "done", "of", "unit", "where"):
        table.add_column(column, justify="right" if column in ("done", "of") else "left")
    for item in items:
        total = "?" if item.total is None else f"{item.total:,}"
        table.add_row(item.stage, item.name, f"{item.done:,}", total, item.unit, item.where)
    return table
