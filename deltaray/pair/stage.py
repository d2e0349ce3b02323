"""Pair: joins the stored responses shard by shard, applies the rules, commits the pair shards and the funnel."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from deltaray.data.paths import PAIRS_PREFIX
from deltaray.data.prompts.shards import shard_name
from deltaray.data.shapes import FUNNEL
from deltaray.data.store import Store
from deltaray.data.tokens import load_tokenizer
from deltaray.data.tokens.answer_frame import frame_of
from deltaray.errors import UserError
from deltaray.pair.describe import delta_path, describe, is_described
from deltaray.pair.draw import Survey, choose
from deltaray.pair.funnel import Funnel, funnel_text, merge_funnels
from deltaray.pair.prompts import dropped_prompts, filter_digest
from deltaray.pair.shard import Unit, pair_shard
from deltaray.pair.token_ids import RULE, complete_tokens, files_by_shard, paired_sides
from deltaray.recipe.filters import Contaminated, DuplicatePrompt
from deltaray.recipe.models import Student
from deltaray.recipe.scorers import scorer_name
from deltaray.recipe.study import Study
from deltaray.runtime.stream import map_units

SHOWN_REASONS = 3

Dropped = dict[int, dict[str, list[str]]]
"""By the place of a filter on prompts and by shard, the ids it removes."""


def inputs_of(study: Study, store: Store, name: str) -> str:
    """A digest of what a pairing is made from: pairs are made again when prompts, responses or scores are others, or
    when the rule is by which texts become ids."""
    pairing = study.pairings[name]
    folders = [Store.prompts, *(Store.responses(teacher) for teacher in pairing.names)]
    folders += [Store.scores(scorer_name(it), teacher) for it in pairing.scorers for teacher in pairing.names]
    filters = [
        filter_digest(store, item) for item in pairing.filters if isinstance(item, DuplicatePrompt | Contaminated)
    ]
    return store.digest(folders, *filters, _samples(study, name), RULE)


def _samples(study: Study, name: str) -> dict[str, int | None]:
    """How many samples of each teacher take part: an earlier recipe may have asked for more. None: all there are."""
    teachers = {teacher: study.teachers.get(teacher) for teacher in study.pairings[name].names}
    return {name: teacher.sampling.samples if teacher else None for name, teacher in teachers.items()}


def is_done(study: Study, store: Store, name: str) -> bool:
    """Whether its pairs are up to date, and what is told of them."""
    return is_paired(study, store, name) and is_described(study, store, name)


def is_paired(study: Study, store: Store, name: str) -> bool:
    return store.made_from(name) == inputs_of(study, store, name)


def pair(
    study: Study,
    store: Store,
    on_pairing: Callable[[str, int], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
    """Makes the pairs of every pairing that is not up to date, and describes them; returns how many by pairing.

    Args:
        say: told what of the responses cannot be trained.

    Raises:
        UserError: rules left no pair of a pairing; what is there shows where they went.
    """
    inputs = {name: inputs_of(study, store, name) for name in study.pairings}
    todo = [name for name in study.pairings if store.made_from(name) != inputs[name]]
    store.delete(path for name in todo for path in (delta_path(name), *_of_earlier_version(store, name)))
    complete_tokens(study, store, paired_sides(study, todo))
    dropped = {name: _dropped(study, store, name) for name in todo}
    chosen = _choose(study, store, [name for name in todo if study.pairings[name].is_drawn], dropped)
    units = [it for name in todo for it in _units(study, store, name, dropped[name], chosen.get(name, {}), write=True)]
    left = {name: sum(unit["pairing"] == name for unit in units) for name in todo}
    funnels: dict[str, list[Funnel]] = {name: [] for name in todo}
    notes = {name: _Notes() for name in todo}
    counts = {}
    for result in map_units(units, partial(pair_shard, store)):
        name = result["pairing"]
        funnels[name].append(result["funnel"])
        notes[name].add(result)
        if len(funnels[name]) == left[name]:
            counts[name] = _commit(store, name, merge_funnels(funnels[name]), inputs[name])
            on_pairing(name, counts[name])
            for line in notes[name].lines(name, study.students[study.student_of(name)]):
                say(line)
    there = [name for name in study.pairings if counts.get(name, 1)]
    describe(study, store, [name for name in there if not is_described(study, store, name)])
    _refuse_empty(store, counts)
    return counts


def _of_earlier_version(store: Store, name: str) -> list[str]:
    """Its files of pairs, which had other names."""
    paths = store.committed(Store.pairs(name))
    return [path for path in paths if not shard_name(path).startswith(PAIRS_PREFIX)]


def _commit(store: Store, name: str, funnel: Funnel, inputs: str) -> int:
    """Writes what is written last; returns the number of pairs. A pairing without any is never done."""
    store.write_json(Store.funnel(name), funnel)
    if funnel[-1]["out"]:
        store.write_json(Store.paired_from(name), {"inputs": inputs})
    return int(funnel[-1]["out"])


def _refuse_empty(store: Store, counts: dict[str, int]) -> None:
    empty = [name for name, pairs in counts.items() if not pairs]
    if empty:
        funnels = [funnel_text(name, store.read_json(Store.funnel(name), FUNNEL)) for name in empty]
        raise UserError("\n".join(["no pairs left; relax what removed them:", *funnels]))


def _dropped(study: Study, store: Store, name: str) -> Dropped:
    filters = enumerate(study.pairings[name].filters)
    on_prompts = {place: item for place, item in filters if isinstance(item, DuplicatePrompt | Contaminated)}
    return {place: dropped_prompts(store, item) for place, item in on_prompts.items()}


def _units(study: Study, store: Store, name: str, dropped: Dropped, chosen: dict[str, Any], write: bool) -> list[Unit]:
    student, samples = study.student_of(name), _samples(study, name)
    tokens = files_by_shard(store, student, list(samples))
    return [
        {
            "pairing": name,
            "prompts": path,
            "spec": study.pairings[name].model_dump(mode="json"),
            "samples": samples,
            "tokens": {teacher: by_shard.get(shard_name(path), []) for teacher, by_shard in tokens.items()},
            "max_length": study.students[student].max_length,
            "dropped": {place: by_shard.get(path, []) for place, by_shard in dropped.items()},
            "chosen": chosen,
            "write": write,
        }
        for path in store.committed(Store.prompts)
    ]


def _choose(study: Study, store: Store, names: list[str], dropped: dict[str, Dropped]) -> dict[str, dict[str, Any]]:
    """For pairings that keep a draw: what decides it, from a survey of all their pairs."""
    units = [unit for name in names for unit in _units(study, store, name, dropped[name], {}, write=False)]
    surveys = {name: Survey() for name in names}
    for result in map_units(units, partial(pair_shard, store)):
        surveys[result["pairing"]].extend(result["survey"])
    return {name: choose(study.pairings[name], survey) for name, survey in surveys.items()}


class _Notes:
    """What of a pairing's responses the student's template has no place for."""

    def __init__(self) -> None:
        self.refusals, self.thoughts = Counter[str](), 0

    def add(self, result: dict[str, Any]) -> None:
        self.refusals.update(result["refusals"])
        self.thoughts += result["thoughts"]

    def lines(self, name: str, student: Student) -> Iterator[str]:
        for reason, count in self.refusals.most_common(SHOWN_REASONS):
            yield f"{name}: {count:,} candidates refused: {reason}"
        if self.thoughts and not frame_of(load_tokenizer(student, "student")).takes_thoughts:
            yield (
                f"{name}: the thoughts of {self.thoughts:,} pairs are not trained: the student's template has no place "
                "for them; their answers are"
            )
