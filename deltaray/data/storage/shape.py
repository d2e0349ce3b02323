"""What a JSON file of ours must look like, as far as its readers rely on it; more keys may be there. Pure.

A shape is a type (`float` takes whole numbers, too), a tuple of shapes of which one fits, `None`, a list of one shape
(any number of items), or a dict: its keys must be there, and `ANY` stands for whatever keys there are.
"""

from typing import Any

ANY = "*"
Shape = Any


def misfit(value: Any, shape: Shape, at: str = "") -> str | None:
    """The first thing that is not as it must be; None where all is."""
    if isinstance(shape, tuple):
        found = [misfit(value, one, at) for one in shape]
        return None if None in found else found[0]
    if isinstance(shape, list):
        return _list(value, shape[0], at)
    if isinstance(shape, dict):
        return _dict(value, shape, at)
    return None if _is(value, shape) else f"{at or 'it'} is {_kind(value)} instead of {_name(shape)}"


def _list(value: Any, shape: Shape, at: str) -> str | None:
    if not isinstance(value, list):
        return f"{at or 'it'} is {_kind(value)} instead of a list"
    return next((wrong for number, it in enumerate(value) if (wrong := misfit(it, shape, f"{at}[{number}]"))), None)


def _dict(value: Any, shape: dict[str, Shape], at: str) -> str | None:
    if not isinstance(value, dict):
        return f"{at or 'it'} is {_kind(value)} instead of an object"
    for name, inside in shape.items():
        if name != ANY and name not in value:
            return f"{at}{'.' if at else ''}{name} is missing"
        for key in value if name == ANY else (name,):
            if wrong := misfit(value[key], inside, f"{at}{'.' if at else ''}{key}"):
                return wrong
    return None


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def _kind(value: Any) -> str:
    return "null" if value is None else "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"


def _name(shape: Any) -> str:
    words = {None: "null", dict: "an object", list: "a list", str: "text", float: "a number", int: "a whole number"}
    return words.get(shape, str(shape))
