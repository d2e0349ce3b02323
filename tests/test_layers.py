"""The structure of the package: imports go down, nothing is imported in a circle, one module knows the paths."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deltaray"
LAYERS = [
    ["errors", "limits", "imports"],
    ["text", "files"],
    ["failures"],
    ["untrusted"],
    ["recipe"],
    ["data"],
    ["model_files"],
    ["report"],
    ["runtime"],
    ["generate"],
    ["score"],
    ["pair"],
    ["train", "evaluate"],
    ["merge", "tune"],
    ["labs"],
    ["study"],
    ["cli"],
    ["__main__"],
]
"""From the lowest to the highest; what stands side by side knows nothing of each other."""
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    """The modules of deltaray that are imported anywhere in a file: at its top, in functions, for types."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in FILES and name not in (module, "deltaray"))


@cache
def imports() -> dict[str, set[str]]:
    return {module: set(imported(ast.parse(file.read_text()), module)) for module, file in FILES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_import_goes_down() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if module != "deltaray" and room(module) != room(other) and HEIGHT[room(other)] >= HEIGHT[room(module)]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_the_layers_are_the_packages() -> None:
    assert HEIGHT.keys() == {room(module) for module in FILES} - {""}


def test_no_file_imports_itself_in_a_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", ["recipe", "data", "data.store", "failures", "report"])
def test_what_describes_a_study_loads_neither_torch_nor_ray(module: str) -> None:
    program = f"import sys, deltaray.{module}; print(*{{'torch', 'ray', 'vllm', 'transformers'}} & sys.modules.keys())"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not loaded.stdout.split()


def test_one_module_spells_the_paths_under_out() -> None:
    texts = {
        (module, node.value)
        for module, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ".deltaray" in node.value
    }
    assert {module for module, _ in texts} == {"deltaray.data.paths"}


def test_the_graph_would_show_a_circle() -> None:
    circle = ["a", "b", "a"]
    with pytest.raises(CycleError):
        TopologicalSorter({after: {before} for before, after in pairwise(circle)}).prepare()
    source = "def f():\n    from deltaray.cli import stages\nimport deltaray.errors\n"
    assert set(imported(ast.parse(source), "deltaray.text")) == {
        "deltaray.cli",
        "deltaray.cli.stages",
        "deltaray.errors",
    }
