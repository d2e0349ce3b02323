"""In the process beside: transformers' own rendering of chat templates, without the second that importing it takes."""

import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any


def _without_the_rest() -> None:
    """Lets one file of transformers be imported alone: it takes nothing of the others but what is given here."""
    spec = PathFinder.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None
    root = spec.submodule_search_locations[0]
    for name, place in (("transformers", root), ("transformers.utils", f"{root}/utils")):
        package = ModuleType(name)
        package.__path__ = [place]
        sys.modules[name] = package
    there = ModuleType("transformers.utils.import_utils")
    there.is_jinja_available = lambda: True  # type: ignore[attr-defined]
    there.is_torch_available = there.is_vision_available = lambda: False  # type: ignore[attr-defined]
    sys.modules[there.__name__] = there


if "transformers" not in sys.modules:
    _without_the_rest()

from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402


def render(options: dict[str, Any]) -> Any:
    """As `render_jinja_template`: (texts, and for each where the assistant speaks)."""
    return render_jinja_template(**options)
