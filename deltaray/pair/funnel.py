"""Where the pairs went: stages whose counts chain from the number of prompts to the number of pairs. Pure.

A stage removes. Only one that makes several candidates of a prompt adds, and then says so in `added`; everywhere
`in - removed + added = out`.
"""

from collections.abc import Sequence
from typing import Any

Stage = dict[str, Any]
Funnel = list[Stage]


def stage(name: str, before: int, after: int) -> Stage:
    """A stage of the funnel: `stage`, `in`, `out`, `removed`, and `added` where something was."""
    counted = {"stage": name, "in": before, "out": after, "removed": max(before - after, 0)}
    return counted | ({"added": after - before} if after > before else {})


def merge_funnels(funnels: Sequence[Funnel]) -> Funnel:
    """Adds up the shards' funnels, stage by stage."""
    merged = []
    for stages in zip(*funnels, strict=True):
        sums = {key: sum(item.get(key, 0) for item in stages) for key in ("in", "out", "removed", "added")}
        sums |= {} if sums["added"] else {"added": None}
        merged.append({"stage": stages[0]["stage"], **{key: it for key, it in sums.items() if it is not None}})
    return merged


def funnel_text(name: str, funnel: Funnel) -> str:
    """The funnel in a few lines, for a message."""
    lines = [f"{name}: {funnel[0]['in']:,} prompts"]
    for item in funnel:
        change = f"+{item['added']:,}" if item.get("added") else f"-{item['removed']:,}"
        lines += [f"  {change:>12} {item['stage']}"] if change != "-0" else []
    return "\n".join([*lines, f"  {funnel[-1]['out']:>12,} pairs"])
