"""A merge as it is asked for, and what no merge can be asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaray.errors import UserError
from deltaray.merge.adapter import DTYPES
from deltaray.merge.methods import DEFAULTS, Options
from deltaray.recipe.merge_methods import METHOD_OPTIONS


@dataclass(frozen=True)
class Merge:
    """A merge as it was asked for.

    adapters: folders. reference: one of them, which GAM aligns the others to; the first if none is named. base: the
    model that all are adapters of, where their files name it differently. dtype: F32, BF16, F16 or F64, what the
    merged adapter is stored in; the widest of the adapters'. into_base: adds the merged update to the base's weights.
    """

    adapters: Sequence[Path]
    method: str = "gam"
    options: Options = DEFAULTS
    reference: str | None = None
    base: str | None = None
    dtype: str | None = None
    into_base: bool = False

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for beside the method and its reference."""
        others = {"base": self.base, "dtype": self.dtype, "into_base": self.into_base}
        return self.options.given() | {name: value for name, value in others.items() if value}


def refuse_own_input(adapters: Sequence[Path], out: Path) -> None:
    """UserError if the merge would replace what it reads."""
    for folder in adapters:
        if Path(folder).expanduser().resolve() == out.resolve():
            raise UserError(f"--out {out}: is one of the adapters; name another folder")


def refuse_merge(merge: Merge) -> None:
    """UserError for what no merge, or not this method, can do."""
    method, options, adapters = merge.method, merge.options, len(merge.adapters)
    if method not in METHOD_OPTIONS:
        raise UserError(f"--method {method}: is not a merge method; give one of {', '.join(METHOD_OPTIONS)}")
    if not adapters:
        raise UserError("merge: no adapters; give the folders of two or more")
    asked = {*options.given(), *(["reference"] if merge.reference is not None else [])}
    for name in sorted(asked - METHOD_OPTIONS[method] - {"weights", "rank", "scale"}):
        users = ", ".join(key for key, allowed in METHOD_OPTIONS.items() if name in allowed)
        raise UserError(f"--{name.replace('_', '-')}: {method} does not take it; methods that do: {users}")
    if merge.dtype is not None and merge.dtype not in DTYPES:
        raise UserError(f"--dtype {merge.dtype}: must be one of {', '.join(DTYPES)}")
    _refuse_values(options, adapters)


def _refuse_values(options: Options, adapters: int) -> None:
    weights = options.weights
    if weights is not None and len(weights) != adapters:
        raise UserError(f"--weights: {len(weights)} of them for {adapters} adapters; give one each")
    if weights is not None and not abs(sum(weights)) > 1e-9 * sum(map(abs, weights)):
        raise UserError("--weights: add up to zero, which leaves nothing to merge; give others")
    if options.rank is not None and options.rank < 1:
        raise UserError(f"--rank {options.rank}: is at least 1")
    if options.density is not None and not 0 < options.density <= 1:
        raise UserError(f"--density {options.density}: is the share of numbers kept, above 0 and at most 1")
    if options.scale is not None and not 0 < abs(options.scale) < float("inf"):
        raise UserError(f"--scale {options.scale}: is a finite number other than 0")
    if options.inner == "mean" and options.density is not None:
        raise UserError("--density: the inner rule `mean` does not take it; use --inner ties or dare")
    if options.seed is not None and options.inner in ("mean", "ties"):
        raise UserError(f"--seed: the inner rule `{options.inner}` draws nothing; use --inner dare")


def find_reference(adapters: Sequence[Path], reference: str | None) -> int:
    """The place of the reference, by its path as given, by the folder it is, or by its name.

    Raises:
        UserError: it is not among the adapters, or its name is that of several.
    """
    if reference is None:
        return 0
    wanted = Path(reference).expanduser()
    for test in (
        lambda path: str(path) == reference,
        lambda path: path.resolve() == wanted.resolve(),
        lambda path: path.resolve().name == reference,
    ):
        places = [place for place, path in enumerate(adapters) if test(path)]
        if len(places) == 1 or len({adapters[place].resolve() for place in places}) == 1:
            return places[0]
        if places:
            raise UserError(f"--reference {reference}: names several of the adapters; give the path of one")
    raise UserError(f"--reference {reference}: is none of the adapters; give one of {', '.join(map(str, adapters))}")
