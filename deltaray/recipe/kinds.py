"""True or false where a number is wanted, and the reverse: pydantic takes one for the other; a reader would not."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from deltaray.recipe.check_pairing import Problem
from deltaray.text.words import short

Kinds = tuple[Any, ...]
"""The types that a value may have."""


def mixed_up(node: Any, kind: Any, at: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    """Every place of a recipe's tree where one stands for the other. Pure.

    Args:
        kind: the type that the tree is to have.
    """
    kinds = _members(kind)
    if isinstance(node, dict):
        for name, value in node.items():
            yield from mixed_up(value, _below(kinds, name, node), (*at, name))
    elif isinstance(node, list):
        of_lists = (member for member in kinds if _origin(member) in (list, tuple))
        items = tuple(it for member in of_lists for inner in get_args(member) for it in _members(inner))
        for number, value in enumerate(node):
            yield from mixed_up(value, items, (*at, number))
    elif isinstance(node, int | float):
        wanted = {scalar for member in kinds for scalar in _scalars(member)}
        if isinstance(node, bool) and wanted & {int, float} and not wanted & {bool, Any}:
            yield at, f"{str(node).lower()}: write a number"
        elif not isinstance(node, bool) and bool in wanted and not wanted & {int, float, Any}:
            yield at, f"{short(repr(node))}: write true or false"


def _below(kinds: Kinds, name: str, node: dict[str, Any]) -> Kinds:
    """The types of what stands under a name of a mapping that has one of these types."""
    found: list[Any] = []
    for member in kinds:
        if _origin(member) is dict:
            found += _members(get_args(member)[1])
        elif isinstance(member, type) and issubclass(member, BaseModel):
            told = member.model_fields.get("kind")
            if name in member.model_fields and (told is None or node.get("kind") in get_args(told.annotation)):
                found += _members(member.model_fields[name].annotation)
    return tuple(found)


def _origin(kind: Any) -> Any:
    """As `get_origin`, whose declared type leaves no room for lists and mappings."""
    return get_origin(kind)


def _members(kind: Any) -> Kinds:
    """The types that a type is one of."""
    if isinstance(kind, tuple):
        return kind
    if _origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if _origin(kind) in (Union, UnionType):
        return tuple(member for it in get_args(kind) for member in _members(it))
    return (kind,)


def _scalars(kind: Any) -> set[Any]:
    return {type(it) for it in get_args(kind)} if _origin(kind) is Literal else {kind}
