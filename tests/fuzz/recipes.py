"""Recipes and `--set`: changed trees, changed bytes, documents that attack the parser; through to the plan's table."""

import io
import json
import os
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import deltaray.labs.miniature.make
import deltaray.study.check_models
import deltaray.train.check
import deltaray.tune.stage  # noqa: F401 - imported here, so that no input is charged for it
from deltaray.errors import StageError, UserError
from deltaray.recipe import dump_recipe, load_recipe, recipe_folder
from deltaray.runtime.terminal import Terminal
from deltaray.study.pipeline import Pipeline
from deltaray.study.plan import plan_json, plan_table
from tests.fuzz.mutate import ODD, TEXTS, change, places, spoil, value

FILES = ("path", "chat_template", "adapter", "model", "out", "directory")
Check = Callable[[random.Random], str]


def prepare(folder: Path) -> Check:
    """The shipped recipes, and one whose models and prompts are there."""
    paths = sorted(recipe_folder().rglob("*.yaml"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    texts = [text if "\ncluster:" in text else f"{text}\ncluster: {{cpus: 999, gpus: 999}}\n" for text in texts]
    trees = [json.loads(json.dumps(YAML(typ="safe").load(text), default=str)) for text in texts]  # nothing is shared
    local = _local(folder)
    terminal = _silent()
    pipe, there = folder / "pipe.jsonl", folder / "there.jsonl"
    os.mkfifo(pipe)
    there.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    files = [str(pipe), str(there), str(folder / "zero.jsonl"), str(folder), "/dev/zero", "/etc/shadow"]

    def check(chance: random.Random) -> str:
        number = chance.randrange(len(trees) + 20)
        tree, text = (trees[number], texts[number]) if number < len(trees) else (local, json.dumps(local))
        content = _content(chance, tree, text, files)
        sets = [_override(chance, tree) for _ in range(chance.choice((0, 0, 0, 1, 3)))]
        path = folder / "recipe.yaml"
        path.write_bytes(content)
        return plan(path, sets, terminal)

    return check


def plan(path: Path, sets: list[str], terminal: Terminal) -> str:
    """As `deltaray plan` does it."""
    try:
        recipe = load_recipe(path, sets)
        dumped = dump_recipe(recipe)
        pipeline = Pipeline(recipe, terminal)
        items, capacity = pipeline.plan()
        terminal.out.print(plan_table(items, f"{pipeline.recipe.name} -> {pipeline.store.out}"))
        terminal.result_json(plan_json(pipeline.study, pipeline.store, items, capacity))
    except (UserError, StageError) as error:
        terminal.say(f"error: {error}")
        if len(str(error)) > 100_000:
            raise AssertionError("a message of more than 100,000 characters") from None
        return "refused"
    again = path.with_name("again.yaml")
    again.write_text(dumped, encoding="utf-8")
    if load_recipe(again) != recipe:
        raise AssertionError("the resolved recipe says something else")
    return "planned"


def _silent() -> Terminal:
    """A terminal whose words go nowhere, but through all of its own code."""
    terminal = Terminal()
    sink = os.open(os.devnull, os.O_WRONLY)
    for console in (terminal.out, terminal.err):
        os.dup2(sink, console.file.fileno())
    return terminal


def _local(folder: Path) -> dict[str, Any]:
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "4"}\n')
    (folder / "tasks.jsonl").write_text('{"prompt": "3+3=", "answer": "6"}\n')
    server = {"url": "http://127.0.0.1:9/v1"}
    return {
        "name": "fuzzed",
        "out": str(folder / "out"),
        "prompts": {"path": str(folder / "prompts.jsonl"), "limit": 2},
        "teachers": {
            "a": {"model": "a", "endpoint": server},
            "b": {"model": "b", "endpoint": server, "system": "Be kind."},
        },
        "scorers": {
            "exact": {"kind": "exact_match"},
            "judge": {"kind": "judge", "by": {"model": "j", "endpoint": server}, "aspects": {"x": "y"}},
            "surface": {"kind": "surface"},
        },
        "pairings": {
            "delta": {
                "chosen": "a", "rejected": "b", "scorer": "exact", "min_delta": 0.5,
                "filters": [{"kind": "length", "max_tokens": 9}],
            },
            "pool": {"policy": "best_over_worst", "teachers": ["a", "b"], "scorer": "surface/characters"},
        },
        "student": {"model": "Qwen/Qwen3-0.6B", "max_length": 64},
        "training": {
            "heldout": 0.1,
            "runs": {
                "delta": {"pairing": "delta", "learning_rate": [1e-5, 2e-5], "intermediate_checkpoints": []},
                "more": {"pairing": ["delta", "pool"], "lora": {"rank": 4}},
            },
        },
        "evaluation": {
            "tasks": {"sums": {"path": str(folder / "tasks.jsonl"), "sampling": {"max_tokens": 4}}},
            "selection": {"other": {"path": str(folder / "prompts.jsonl")}},
            "claims": ["delta > student"],
        },
        "exploration": {
            "pairing": {"scorer": "exact"},
            "space": {"min_delta": [None, 0.5], "learning_rate": [1e-5, 1e-4], "beta": [0.1, 5]},
            "search": "grid",
        },
        "seeds": [0, 1],
        "cluster": {"cpus": 8, "gpus": 0},
    }  # fmt: skip


# --- what is changed ----------------------------------------------------------------------------------------------
def _content(chance: random.Random, tree: Any, text: str, files: list[str]) -> bytes:
    kind = chance.random()
    if kind < 0.7:
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            tree = change(chance, tree)
        if chance.random() < 0.2:
            tree = _with_file(chance, tree, files)
        return _dumped(chance, tree)
    if kind < 0.97:
        return spoil(chance, text.encode())
    return chance.choice(_ATTACKS)(chance)


def _with_file(chance: random.Random, tree: Any, files: list[str]) -> Any:
    tree = json.loads(json.dumps(tree, default=str))
    named = [
        place
        for place in places(tree)
        if place and place[-1] in ("path", "chat_template", "adapter", "model", "out", "directory")
    ]
    if named:
        place = chance.choice(named)
        inside = tree
        for part in place[:-1]:
            inside = inside[part]
        inside[place[-1]] = chance.choice(files)
    return tree


def _dumped(chance: random.Random, tree: Any) -> bytes:
    if chance.random() < 0.5:
        return json.dumps(tree, default=str).encode()
    buffer = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            YAML(typ="safe").dump(tree, buffer)
    except Exception:
        return json.dumps(tree, default=str).encode()
    return buffer.getvalue().encode(errors="surrogatepass")


def _override(chance: random.Random, tree: Any) -> str:
    """One `--set`."""
    place = [str(part) for part in chance.choice(places(tree)[1:] or [("name",)])]
    if chance.random() < 0.3:
        place.insert(chance.randrange(len(place) + 1), str(value(chance)))
    if chance.random() < 0.1:
        place[chance.randrange(len(place))] = chance.choice(TEXTS)
    odd = chance.choice(ODD).decode(errors="surrogateescape")
    text = chance.choice((str, json.dumps))(chance.choice((value(chance), value(chance), odd)))
    return f"{'.'.join(place)}{chance.choice(('=', '=', '=', '=', '', ' = ', '=='))}{text}"


def _bomb(chance: random.Random) -> bytes:
    width, levels = chance.choice((2, 9, 30)), chance.choice((3, 9, 40))
    lines = ["name: x", "a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


def _merges(chance: random.Random) -> bytes:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: 1}}" for n in range(1, chance.choice((4, 30, 200)))]
    return "\n".join(lines).encode()


def _deep(chance: random.Random) -> bytes:
    mark = chance.choice(("[", "{", "- ", "? ", "{a: ", "a:\n ", "&x [", "!!seq [", "-\n"))
    return b"name: " + mark.encode() * chance.choice((40, 1000, 20_000))


def _wide(chance: random.Random) -> bytes:
    count = chance.choice((1000, 30_000, 100_000))
    return chance.choice((
        lambda: "".join(f"k{n}: {n}\n" for n in range(count)),
        lambda: f"name: x\nout: y\nseeds: [{', '.join(map(str, range(count)))}]\n",
        lambda: f"name: {'x' * count}\n",
        lambda: "#" * count,
        lambda: "a: 'x" + "\n" * count,
        lambda: "a: " + " " * count + "b",
        lambda: "a" * count + ": b",
        lambda: "[" + "a, " * count,
    ))().encode()  # fmt: skip


def _itself(chance: random.Random) -> bytes:
    return chance.choice((b"&a [*a]", b"name: &a {x: *a}", b"&a {<<: *a}", b"a: &a [*a, *a]\nname: *a"))


def _encoded(chance: random.Random) -> bytes:
    documents = ("name: x\nout: y\n", "- a\n- b\n", "", "just text", "a: 1\n---\nb: 2\n", "name: x\r\nout: y\r\n")
    text = chance.choice((*documents, "name:\tx\n\tout: y"))
    return text.encode(chance.choice(("utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-16-le")))


_ATTACKS = (_bomb, _merges, _deep, _wide, _itself, _encoded)
