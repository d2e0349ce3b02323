"""What is impossible in the merging section, and in runs that go on from another run."""

from collections.abc import Iterator

from deltaray.recipe.check_pairing import Problem, unknown
from deltaray.recipe.merge_methods import METHOD_OPTIONS
from deltaray.recipe.merging import MergeMethod, Merging
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.training import Run


def check_merging(recipe: Recipe) -> Iterator[Problem]:
    """All contradictions of the section; key paths are whole."""
    merging = recipe.merging
    if merging is None:
        return
    if not (recipe.evaluation and recipe.evaluation.selection):
        yield ("merging",), "the best delta is GAM's reference: add tasks to find it on as `evaluation.selection`"
    runs = recipe.training.runs if recipe.training else {}
    yield from _check_deltas(merging, runs)
    for number, count in enumerate(merging.counts or []):
        if not 2 <= count <= len(merging.deltas):
            yield (
                ("merging", "counts", number),
                f"write numbers from 2 to {len(merging.deltas)}, of the deltas to merge",
            )
    for name, method in merging.methods.items():
        yield from ((("merging", "methods", name, *at), text) for at, text in _check_method(name, method))
    taken = {*runs, *recipe.teachers, *([recipe.student.name] if recipe.student else [])}
    for merged, (name, _) in merging.names().items():
        if merged in taken:
            yield (
                ("merging", "methods", name),
                f"its merge {merged!r} has the name of another model; rename one of them",
            )


def _check_deltas(merging: Merging, runs: dict[str, Run]) -> Iterator[Problem]:
    for number, name in enumerate(merging.deltas):
        at = ("merging", "deltas", number)
        if name not in runs:
            yield at, unknown("run", name, runs)
        elif name in merging.deltas[:number]:
            yield at, "names a run twice; every delta is merged once"
        elif runs[name].lora is None:
            yield at, f"trains all weights; give training.runs.{name} a `lora`"
        elif isinstance(runs[name].learning_rate, list):
            yield at, f"is a grid; write one learning_rate in training.runs.{name}"
    found = {runs[name].seed for name in merging.deltas if name in runs}
    if len(found) > 1:
        yield ("merging", "deltas"), "adapters that are merged start alike: give their runs one `seed`"


def _check_method(name: str, method: MergeMethod) -> Iterator[Problem]:
    chosen = method.method or name
    if chosen not in METHOD_OPTIONS:
        yield (("method",) if method.method else ()), unknown("merge method", chosen, METHOD_OPTIONS)
        return
    known = {"method", "rank", "scale"} | METHOD_OPTIONS[chosen]
    asked = {key for key, value in method.model_dump().items() if value is not None and value is not False}
    for key in sorted(asked - known):
        users = ", ".join(other for other, options in METHOD_OPTIONS.items() if key in options)
        yield (key,), f"the method {chosen!r} does not take it; leave it out, or write one that does: {users}"


def check_after(name: str, runs: dict[str, Run]) -> Iterator[str]:
    """Why a run cannot go on from the one it names."""
    run = runs[name]
    if run.after not in runs:
        yield unknown("run", str(run.after), runs)
        return
    before = runs[run.after]
    if isinstance(before.learning_rate, list):
        yield "is a grid, whose best is known only after the evaluation; name a run with one learning_rate"
    if before.lora != run.lora:
        yield f"goes on with what {run.after} trains: write the same `lora` in both, or in neither"
    if run.loss == "kto":
        yield "kto takes the weights it starts from for its reference; use another loss"
    seen: set[str] = {name}
    at: str | None = run.after
    while at is not None and at not in seen and at in runs:
        seen.add(at)
        at = runs[at].after
    if at in seen:
        yield "leads back to itself; name a run that comes before"
