"""The merge methods by name and the options that each takes. What they compute is in `deltaray/merge/methods.py`."""

from collections.abc import Mapping
from types import MappingProxyType

_RULED = frozenset({"inner", "density", "seed", "skip_missing"})
METHOD_OPTIONS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "gam": frozenset({"restore_norm", "skip_missing", "reference"}),
        "mean": frozenset({"skip_missing"}),
        "task-arithmetic": frozenset(),
        "cat": frozenset(),
        "ties": frozenset({"density", "skip_missing"}),
        "dare": frozenset({"density", "seed", "skip_missing"}),
        "knots": _RULED,
        "core-space": _RULED,
        "tsv": frozenset(),
        "iso-c": frozenset(),
        "iso-cts": frozenset(),
    }
)
"""By the name that `--method` takes; all of them take `weights`, `rank` and `scale` as well."""
