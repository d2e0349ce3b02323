"""YAML as plain values and the line of each: mappings, lists, text, finite numbers, true, false and null.

Everything else that YAML knows (sets, bytes, tags of other languages, numbers that are none) has no meaning in a recipe
and is refused with its line; a date is text. `deltaray/limits.py` says how large a document may be: aliases are counted
as if they were written out, so that a few lines cannot become gigabytes.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from deltaray.errors import first_line
from deltaray.limits import RECIPE_BYTES, RECIPE_DEPTH, RECIPE_VALUES, WHOLE_NUMBER
from deltaray.text.words import is_unicode

Path_ = tuple[str | int, ...]

TAG = "tag:yaml.org,2002:"
TRUTH = {"true": True, "yes": True, "on": True, "y": True, "false": False, "no": False, "off": False, "n": False}
DIGITS = 40
"""Longer numbers are not even converted."""
_UNFIT = re.compile("[\x00\ud800-\udfff]")
_INTEGER = re.compile(r"[-+]?(?:0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")


class YamlError(ValueError):
    """What is wrong with a document, and what to do about it."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line, self.text = line, text


@dataclass
class Document:
    """A document's plain value, and where its parts stand."""

    value: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)

    def line(self, at: Path_) -> int:
        """The line of the deepest key of a path that stands in the document."""
        for end in range(len(at), 0, -1):
            if at[:end] in self.lines:
                return self.lines[at[:end]]
        return 1


def read_yaml(text: str) -> Document:
    """One document.

    Raises:
        YamlError: it is not YAML, holds what no recipe can, or is too large.
    """
    if len(text) > RECIPE_BYTES or len(text.encode(errors="surrogatepass")) > RECIPE_BYTES:
        raise YamlError(1, f"is larger than {RECIPE_BYTES:,} bytes; leave out what no recipe needs")
    try:
        node = _composed(text)
    except YamlError:
        raise
    except RecursionError:
        raise YamlError(1, _too_deep()) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        text = _too_deep() if "maximum depth" in str(error.problem) else f"not YAML: {error.problem}; {CORRECT}"
        raise YamlError(mark.line + 1 if mark else 1, text) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"holds U+{int(error.character):04X}, which YAML does not allow") from None
    except Exception as error:  # a parser's own mistakes
        raise YamlError(1, f"not YAML: {first_line(error)}; {CORRECT}") from None
    document = Document()
    document.value = None if node is None else _Builder(document).value(node, ())
    return document


CORRECT = "correct the indentation or quoting there"


def _too_deep() -> str:
    return f"is nested deeper than {RECIPE_DEPTH} sections"


class _Bounded(Composer):
    """Counts what it reads."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.warn_double_anchors = False  # YAML allows it
        self.count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count += 1
        if self.count > RECIPE_VALUES:
            raise YamlError(self.parser.peek_event().start_mark.line + 1, _too_many())
        return super().compose_node(parent, index)


def _too_many() -> str:
    return f"holds more than {RECIPE_VALUES:,} keys and values, with aliases written out"


def _composed(text: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Bounded
    yaml.max_depth = RECIPE_DEPTH
    node: Node | None = yaml.compose(text)
    return node


class _Builder:
    """Values out of nodes. Every alias becomes a value of its own."""

    def __init__(self, document: Document) -> None:
        self.lines, self.count = document.lines, 0

    def value(self, node: Node, at: Path_) -> Any:
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > RECIPE_VALUES:
            raise YamlError(line, _too_many())
        if len(at) > RECIPE_DEPTH:
            raise YamlError(line, _too_deep())
        tag = str(node.tag)
        if isinstance(node, MappingNode) and tag == f"{TAG}map":
            return self._mapping(node, at)
        if isinstance(node, SequenceNode) and tag == f"{TAG}seq":
            return self._list(node, at)
        if isinstance(node, ScalarNode):
            return _scalar(tag.removeprefix(TAG), str(node.value), line)
        raise YamlError(line, _no_tag(tag))

    def _list(self, node: SequenceNode, at: Path_) -> list[Any]:
        found = []
        for number, item in enumerate(node.value):
            self.lines[*at, number] = item.start_mark.line + 1
            found.append(self.value(item, (*at, number)))
        return found

    def _mapping(self, node: MappingNode, at: Path_) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, (line, item) in self._items(node, 0).items():
            self.lines[*at, name] = line
            found[name] = self.value(item, (*at, name))
        return found

    def _items(self, node: MappingNode, depth: int) -> dict[str, tuple[int, Node]]:
        """Name -> (line, value) with what `<<` brings along, which the mapping's own keys replace."""
        own: dict[str, tuple[int, Node]] = {}
        merged: dict[str, tuple[int, Node]] = {}
        merges = 0
        for key, item in node.value:
            line = key.start_mark.line + 1
            if str(key.tag) == f"{TAG}merge":
                merges += 1
                sources = item.value if isinstance(item, SequenceNode) else [item]
                for source in sources:
                    merged = self._merged(source, line, depth) | merged
                continue
            name = _name(key, line)
            if name in own:
                raise YamlError(line, f"the key {name!r} stands twice in one section; leave one out")
            own[name] = (line, item)
        if merges > 1:
            raise YamlError(node.start_mark.line + 1, "`<<` stands twice in one section; write `<<: [*a, *b]`")
        return own | {name: it for name, it in merged.items() if name not in own}

    def _merged(self, source: Node, line: int, depth: int) -> dict[str, tuple[int, Node]]:
        if depth > RECIPE_DEPTH:
            raise YamlError(line, _too_deep())
        if not isinstance(source, MappingNode) or str(source.tag) != f"{TAG}map":
            raise YamlError(line, "`<<` takes an alias of a section, such as `<<: *common`, or a list of them")
        self.count += len(source.value)
        if self.count > RECIPE_VALUES:
            raise YamlError(line, _too_many())
        return self._items(source, depth + 1)


def _name(key: Node, line: int) -> str:
    if not isinstance(key, ScalarNode):
        raise YamlError(line, "a key is a list or a section; write a name")
    return _text(str(key.value), line)


def _scalar(kind: str, text: str, line: int) -> Any:
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in TRUTH:
        return TRUTH[text.lower()]
    if kind == "int":
        return _whole(text, line)
    if kind == "float":
        return _number(text, line)
    if kind in ("str", "timestamp"):
        return _text(text, line)
    raise YamlError(line, _no_tag(kind))


def _no_tag(tag: str) -> str:
    return f"the tag {tag!r} has no meaning here; write text, a number, true, false, null, a list or a section"


def _text(text: str, line: int) -> str:
    if not is_unicode(text):  # JSON writes one character as two halves
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    if found := _UNFIT.search(text):
        raise YamlError(line, f"holds U+{ord(found[0]):04X}, which no file name and no table can hold; leave it out")
    return text


def _whole(text: str, line: int) -> int:
    digits = text.replace("_", "")
    if len(digits) <= DIGITS and _INTEGER.fullmatch(text):
        base = 8 if "0o" in digits else 16 if "0x" in digits else 10
        number = int(digits, base)
        if abs(number) <= WHOLE_NUMBER:
            return number
    shown = digits if len(digits) <= DIGITS else f"{digits[:DIGITS]}…"
    raise YamlError(line, f"{shown}: write a whole number from -2^63+1 to 2^63-1, in decimal")


def _number(text: str, line: int) -> float:
    try:
        number = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise YamlError(line, f"{text[:DIGITS]}: write a finite number")
    return number
