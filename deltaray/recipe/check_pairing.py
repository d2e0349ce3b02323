"""What is impossible in one pairing, given the names that exist elsewhere in its recipe."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from deltaray.recipe.filters import Correctness, Length
from deltaray.recipe.pairing import Pairing
from deltaray.recipe.scorers import Judge, Scorer, Surface, scorer_name

Problem = tuple[tuple[str | int, ...], str]
"""(key path, what is wrong and what to write instead)."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist, with the nearest that does."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"write one of: {', '.join(names) or '(none defined)'}"
    return f"there is no {kind} {name!r}; {hint}"


def check_pairing(pairing: Pairing, teachers: list[str], scorers: Mapping[str, Scorer]) -> Iterator[Problem]:
    """All contradictions of a pairing; key paths start below its name."""
    yield from _check_two(pairing, teachers) if pairing.policy == "by_sample" else _check_pool(pairing, teachers)
    yield from _check_scores(pairing, scorers)
    for low, high in (("min_delta", "max_delta"), ("min_quantile", "max_quantile")):
        least, most = getattr(pairing, low), getattr(pairing, high)
        if least is not None and most is not None and least > most:
            yield (low,), f"is larger than {high}: no pair can pass"
    if pairing.stratify and pairing.limit is None:
        yield ("stratify",), "spreads `limit` over the sources: add `limit: N`"
    for number, item in enumerate(pairing.filters):
        if isinstance(item, Length) and item.max_tokens is None and item.min_tokens is None:
            yield ("filters", number), "write max_tokens, min_tokens or both"


def _check_two(pairing: Pairing, teachers: list[str]) -> Iterator[Problem]:
    for side in ("chosen", "rejected"):
        teacher = getattr(pairing, side)
        if not teacher:
            yield (side,), "is missing; add it"
        elif teacher not in teachers:
            yield (side,), unknown("teacher", teacher, teachers)
    if pairing.chosen and pairing.chosen == pairing.rejected:
        yield (
            ("rejected",),
            f"chosen and rejected are both {pairing.chosen!r}; name two different teachers, or use `teachers: "
            f"[{pairing.chosen}]` with `policy: best_over_worst`",
        )
    for key in ("teachers", "draw"):
        if getattr(pairing, key):
            yield (key,), "belongs to `policy: best_over_worst` or `best_over_random`; leave it out"


def _check_pool(pairing: Pairing, teachers: list[str]) -> Iterator[Problem]:
    if not pairing.teachers:
        yield ("teachers",), f"is missing: `policy: {pairing.policy}` chooses among the responses of `teachers: [...]`"
    for key in ("chosen", "rejected"):
        if getattr(pairing, key):
            yield (key,), f"`policy: {pairing.policy}` finds out itself; list all in `teachers` instead"
    for number, teacher in enumerate(pairing.teachers):
        if teacher not in teachers:
            yield ("teachers", number), unknown("teacher", teacher, teachers)
    if pairing.scorer is None:
        yield ("scorer",), f"is missing: `policy: {pairing.policy}` goes by scores"
    if pairing.draw is not None:
        yield from _check_draw(pairing)


def _check_draw(pairing: Pairing) -> Iterator[Problem]:
    draw = pairing.draw
    assert draw is not None
    for number, teacher in enumerate(draw.weak_teachers):
        if teacher not in pairing.teachers:
            yield ("draw", "weak_teachers", number), unknown("teacher of this pairing", teacher, pairing.teachers)
    weak = len(set(draw.weak_teachers))
    strong = len(set(pairing.teachers)) - weak
    if draw.weak > min(weak, draw.of) or draw.of - draw.weak > strong:
        yield (
            ("draw",),
            f"{draw.weak} of {weak} weak and {draw.of - draw.weak} of {strong} other teachers cannot be drawn",
        )


def _check_scores(pairing: Pairing, scorers: Mapping[str, Scorer]) -> Iterator[Problem]:
    wanted: list[tuple[tuple[str | int, ...], str]] = [(("scorer",), pairing.scorer)] if pairing.scorer else []
    for number, item in enumerate(pairing.filters):
        wanted += [(("filters", number, "scorer"), item.scorer)] if isinstance(item, Correctness) else []
    for at, reference in wanted:
        name, slash, part = reference.partition("/")
        if name not in scorers:
            yield at, unknown("scorer", scorer_name(reference), scorers)
        elif slash and (parts := _parts(scorers[name])) is not None and part not in parts:
            yield at, unknown(f"part of scorer {name}:", part, parts)
    keys = ("min_delta", "max_delta", "min_quantile", "max_quantile")
    asked = pairing.keep != "all" or any(getattr(pairing, key) is not None for key in keys)
    if asked and pairing.scorer is None and pairing.policy == "by_sample":
        yield (), "keep, min_delta, max_delta and quantiles need scores: add `scorer: NAME`"


def _parts(scorer: Scorer) -> list[str] | None:
    """The parts that a scorer's scores are made of, where they are known beforehand."""
    if isinstance(scorer, Surface):
        return list(STATISTICS)
    if isinstance(scorer, Judge) and scorer.against is None:
        return list(scorer.aspects)
    return None


STATISTICS: tuple[str, ...] = Surface.model_fields["statistic"].annotation.__args__  # type: ignore[union-attr]
