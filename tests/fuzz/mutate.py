"""Hostile values, changed trees and changed bytes. Everything is drawn from the generator that is given."""

import copy
import json
import random
from typing import Any

NUMBERS: list[Any] = [
    0, -1, 1, 2, 10**9, 10**18, 10**400, -(10**30), 2**31, 2**63, 2**64, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), -float("inf"), True, False,
]  # fmt: skip
TEXTS = [
    "", " ", "\n", "a\0b", "\ud800", "\udcff x", "\ufeff", "é" * 300, "x" * 5000, "a/" * 3000, "../" * 40,
    "~nobody/x", "[red]", "[/]", "[bold", ":smile:", "\x1b[31m", "nan", ".nan", "inf", "-.inf", "1e999", "5e-8",
    "0x1F", "1_000", "²", "٣", "yes", "no", "on", "null", "~", "2020-01-01", "2020-13-45", "12:30:45", "{seed}",
    "{prompt}", "http://[", "s3://", "s3://b/x?region=[", "gs://x", "file:///dev/zero", "/dev/zero", "/dev/null",
    "/dev/stdin", "/", ".", "..", "/proc/self/mem", "C:\\x", "a b", "a\tb", "CON", "-x", "--set", "$HOME", "%s%n",
    "{}", "{0.__class__}", "{{ x }}", "{% for %}", "(a+)+$", "<script>", "' OR 1=1", "=1+1", "owner/name", "a/b/c",
    "delta > student", "name/part", "9" * 30,
]  # fmt: skip


def value(chance: random.Random) -> Any:
    """Any value."""
    kind = chance.random()
    if kind < 0.4:
        return chance.choice(TEXTS)
    if kind < 0.75:
        return chance.choice(NUMBERS)
    simple: list[Any] = [None, [], {}, [[]], [None], {"": ""}, [1, 1], ["a", "a"], [1, "a", None, {}], {"kind": "x"}]
    return copy.deepcopy(chance.choice(simple))


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a tree, the root first."""
    found = [at]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inside in items:
        found += places(inside, (*at, key))
    return found


def at(tree: Any, place: tuple[Any, ...]) -> Any:
    for part in place:
        tree = tree[part]
    return tree


def change(chance: random.Random, tree: Any) -> Any:
    """A copy of a tree with one change: of a value, a key, an order, or the structure."""
    tree = copy.deepcopy(tree)
    where = chance.choice(places(tree))
    if not where:
        return value(chance) if chance.random() < 0.05 else tree
    parent, key = at(tree, where[:-1]), where[-1]
    act = chance.choice(
        ("set", "set", "set", "delete", "copy", "swap", "wrap", "rename", "many", "retype", "near", "near", "near")
    )
    if act == "set":
        parent[key] = value(chance)
    elif act == "delete":
        del parent[key]
    elif act in ("copy", "swap"):
        other = chance.choice(places(tree)[1:])
        taken = copy.deepcopy(at(tree, other))
        if act == "swap" and other[: len(where)] != where and where[: len(other)] != other:
            at(tree, other[:-1])[other[-1]] = parent[key]
        parent[key] = taken
    elif act == "wrap":
        parent[key] = chance.choice(([parent[key]], {"x": parent[key]}, {str(key): parent[key]}, [parent[key]] * 3))
    elif act == "rename" and isinstance(parent, dict):
        parent[chance.choice((str(key).upper(), f"{key}s", f"{key}-seed1", f"{key}-lr0.0001", str(value(chance))))] = (
            parent.pop(key)
        )
    elif act == "many":
        parent[key] = [copy.deepcopy(parent[key]) for _ in range(chance.choice((2, 50, 300)))]
    elif act == "near":
        parent[key] = _near(chance, parent[key], tree)
    elif act == "retype":
        inside = parent[key]
        parent[key] = str(inside) if not isinstance(inside, str) else len(inside)
    return tree


def _near(chance: random.Random, inside: Any, tree: Any) -> Any:
    """Another value of the same type."""
    if isinstance(inside, bool):
        return not inside
    if isinstance(inside, int | float):
        return chance.choice((inside + 1, inside * 2, inside * 1000, inside / 3, -inside, type(inside)(0)))
    texts = [it for place in places(tree) if isinstance(it := at(tree, place), str)]
    return chance.choice(texts) if isinstance(inside, str) else inside


def spoil(chance: random.Random, content: bytes) -> bytes:
    """Bytes with some changes: flipped, cut, doubled, put in."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        if not data:
            break
        where, act = (
            chance.randrange(len(data)),
            chance.choice(("flip", "byte", "cut", "insert", "delete", "double", "end")),
        )
        if act == "flip":
            data[where] ^= 1 << chance.randrange(8)
        elif act == "byte":
            data[where] = chance.randrange(256)
        elif act == "cut":
            del data[where:]
        elif act == "insert":
            data[where:where] = chance.choice(ODD)
        elif act == "delete":
            del data[where : where + chance.choice((1, 2, 8, 100))]
        elif act == "double":
            data[where:where] = data[where : where + chance.choice((1, 10, 1000))]
        else:
            end = max(0, len(data) - chance.randrange(1, 200))
            data[end : end + 1] = bytes([chance.randrange(256)])
    return bytes(data)


ODD = [
    b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\t", b"\xe2\x80\xa8", b"\xed\xa0\x80",
    b"[" * 2000, b"{" * 2000, b'{"a":' * 2000, b"- " * 500, b"&a ", b"*a",
    b"!!python/object/apply:os.system ['id']", b"!!binary x", b"<<: *a", b"---\n", b"...\n", b"%YAML 1.1\n---\n",
    b"? ", b"|", b">", b"'", b'"', b"\\", b"\\ud800", b"#", b": ", b",", b"}", b"]", b"1e999", b"NaN", b"-Infinity",
    b"9" * 5000, b"null", b"\x1b[2J", b"[red]", b"\n" * 50, b" " * 200,
]  # fmt: skip


def json_bytes(tree: Any) -> bytes:
    """JSON, with what JSON does not know (NaN, lone surrogates) as Python writes it."""
    return json.dumps(tree, default=str).encode()
