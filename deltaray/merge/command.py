"""`deltaray merge`: the command line's values into options, the merge into a table or JSON."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from deltaray.errors import UserError
from deltaray.merge.arguments import Merge
from deltaray.merge.elementwise import Inner
from deltaray.merge.methods import Options
from deltaray.merge.run import merge_adapters
from deltaray.merge.table import diagnosis_table
from deltaray.runtime.terminal import Terminal


def recipe_among(adapters: Sequence[Path], given: Sequence[str]) -> Path | None:
    """The recipe to merge from; None if these are adapters.

    Args:
        given: the parameters of the command that were written out, by name.

    Raises:
        UserError: what belongs to the one form stands beside the other.
    """
    recipes = [path for path in adapters if path.suffix in (".yaml", ".yml")]
    if not recipes:
        if "overrides" in given:
            raise UserError("--set: belongs to a recipe, and these are adapters; leave it out")
        if "out" not in given:
            raise UserError("--out: is missing; name the folder that the merged adapter goes to")
        return None
    if len(adapters) > 1:
        raise UserError(f"{recipes[0]}: a recipe stands alone: its `merging:` names what is merged; leave out the rest")
    if options := [name for name in given if name not in ("adapters", "overrides")]:
        option = options[0].removeprefix("as_").replace("_", "-")
        raise UserError(f"--{option}: how and where to merge says the recipe's `merging:`; leave it out")
    return recipes[0]


def parse_options(
    weights: str | None,
    rank: int | None,
    scale: float | None,
    density: float | None,
    seed: int | None,
    inner: str | None,
    restore_norm: bool,
    skip_missing: bool,
) -> Options:
    """The options of a command line.

    Raises:
        UserError: weights are not numbers, or there is no such inner rule.
    """
    rule: Inner | None = None
    if inner is not None:
        rule = next((name for name in get_args(Inner) if name == inner), None)
        if rule is None:
            raise UserError(f"--inner {inner}: must be one of {', '.join(get_args(Inner))}")
    numbers = None if weights is None else _numbers(weights)
    return Options(numbers, rank, scale, density, seed, rule, restore_norm, skip_missing)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--weights {text}: are numbers with commas between them, such as 1,1,0.5") from None
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"--weights {text}: must be finite")
    return numbers


def merge_command(terminal: Terminal, merge: Merge, out: Path, as_json: bool) -> None:
    """Merges, shows the diagnosis on stdout and as a page, and what else the user should know on stderr."""
    from deltaray.report.build import write_merge_page

    with terminal.progress("merge", "matrices") as view:
        report = merge_adapters(merge, out, lambda done, total: view.update(merge.method, done, total))
    page = write_merge_page(out)
    if as_json:
        terminal.result_json(report.record())
    else:
        terminal.out.print(diagnosis_table(report))
        terminal.result(f"{'model' if merge.into_base else 'adapter'}: {out}")
        terminal.result(f"diagnosis: {page}")
    for warning in report.warnings:
        terminal.say(f"warning: {warning}")
