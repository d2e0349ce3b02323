"""From a YAML file and `--set` overrides to a checked `Recipe`; every refusal names file, line, key and the mend."""

import io
import re
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError

from deltaray.clean import keep_secret, known_secrets, without_secrets
from deltaray.errors import UserError
from deltaray.recipe.check import check_recipe
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.secrets import OUTSIDE, line_with_secret, named_variables, secrets_in, variables_in

Path_ = tuple[str | int, ...]
KEY_PATH = re.compile(r"[A-Za-z_][\w.-]{0,200}")
"""What a message of an override shows of it."""


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads, overrides and checks a recipe.

    Raises:
        UserError: one line per problem, `file:line: key.path: what is wrong, what to write instead`.
    """
    overrides = overrides or []
    variables = _variables_named(path, overrides)
    try:
        return _load(path, overrides, variables)
    except UserError as error:  # whatever it quotes
        raise UserError(without_secrets(str(error), known_secrets(variables))) from None


def _load(path: Path, overrides: list[str], variables: set[str]) -> Recipe:
    tree = _read(path)
    overridden = [_override(tree, item) for item in overrides]
    plain = _plain(tree)
    variables |= variables_in(plain)
    known = known_secrets(variables)
    found = list(secrets_in(plain, known))  # first: other messages quote what they refuse
    if not found and (line := line_with_secret(path.read_text(encoding="utf-8"), known)):
        raise UserError(f"{path}:{line}: {OUTSIDE}")
    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        found = found or [(_real_path(tree, issue["loc"]), _explain(issue)) for issue in error.errors()]
    else:
        found = found or list(check_recipe(recipe))
        if not found:
            keep_secret(variables)
            return recipe
    first_of_each = dict(reversed(found))  # a union reports once per member
    lines = [_message(path, tree, at, text, overridden) for at, text in first_of_each.items()]
    raise UserError("\n".join(reversed(lines)))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    buffer = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(recipe.model_dump(mode="json"), buffer)
    return buffer.getvalue()


def _variables_named(path: Path, overrides: list[str]) -> set[str]:
    """The variables that a recipe names as keys, whatever else is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # which `_read` tells
        text = ""
    return named_variables("\n".join([text, *overrides]))


def _read(path: Path) -> CommentedMap:
    if not path.is_file():
        raise UserError(f"{path}: there is no such recipe; give the path of a YAML file")
    try:
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = str(error.problem).partition(" with value ")[0]  # of a key that is there twice it quotes both values
        raise UserError(f"{path}:{line}: not YAML: {problem}; mend the indentation or quoting there") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path}:1: a recipe is a mapping of keys (name, out, prompts, teachers, …)")
    return tree


def _override(tree: CommentedMap, item: str) -> Path_:
    """Applies one `key.path=value`; the value is YAML, so numbers, lists and null work. Messages quote no value."""
    key, equals, text = item.partition("=")
    shown = f"--set {key}" if KEY_PATH.fullmatch(key.strip()) else "--set"
    if not equals or not key.strip():
        raise UserError(f"{shown}: write key.path=value, for example --set training.workers=2")
    try:
        value = YAML(typ="safe").load(text) if text.strip() else None
    except MarkedYAMLError:
        raise UserError(f"{shown}: the value is not YAML; put quotes around it") from None
    path = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
    node: Any = tree
    for depth, part in enumerate(path[:-1]):
        node = _descend(node, part, shown, ".".join(map(str, path[: depth + 1])))
    _assign(node, path[-1], value, shown)
    return path


def _descend(node: Any, part: str | int, where: str, so_far: str) -> Any:
    if isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
        return node[part]
    if isinstance(node, dict):
        child = node.get(part, node.get(str(part)))
        if child is None:
            child = node[str(part)] = CommentedMap()
        return child
    raise UserError(f"{where}: {so_far} is not a section that holds keys")


def _assign(node: Any, part: str | int, value: Any, where: str) -> None:
    if isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
        node[part] = value
    elif isinstance(node, dict):
        node[str(part)] = value
    else:
        raise UserError(f"{where}: the key cannot be set there: the one before it is not a section that holds keys")


def _plain(node: Any) -> Any:
    """Strips ruamel's types, so that pydantic's messages speak of plain ones."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _real_path(tree: Any, loc: Path_) -> Path_:
    """Drops the union members' names that pydantic puts into a location (`learning_rate.float`)."""
    path: list[str | int] = []
    node = tree
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        inside = isinstance(node, dict | list)
        if not inside:
            break
        path.append(part)
        known = part in node if isinstance(node, dict) else isinstance(part, int) and part < len(node)
        if known:
            node = node[part]
        elif not last:
            path.pop()
    return tuple(path)


def _explain(issue: Any) -> str:
    kind, context = issue["type"], issue.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(issue["loc"])
    if kind == "missing":
        return "is missing; add it"
    if kind == "literal_error":
        return f"{issue['input']!r} is not allowed; write {context['expected']}"
    if kind == "union_tag_not_found":
        return "`kind` is missing; add it"
    if kind == "union_tag_invalid":
        return f"kind {context['tag']!r} is not allowed; write one of: {context['expected_tags']}"
    if kind == "value_error":
        return f"{issue['input']!r} is not allowed; write {context['error']}"
    if kind == "string_pattern_mismatch":
        return f"{issue['input']!r}: use letters, digits, '.', '_' and '-' only"
    message = (issue["msg"][0].lower() + issue["msg"][1:]).partition(", unable to parse")[0]
    return f"{issue['input']!r}: {message.replace('input should be', 'write').replace('valid ', '')}"


def _unknown_key(loc: Path_) -> str:
    model: Any = Recipe
    for part in loc[:-1]:
        model = _child(model, part)
    known = sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    close = get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    return f"unknown key; known here: {', '.join(known)}"


def _child(kind: Any, part: str | int) -> Any:
    """The type found under `part` of a type: a model's field, a mapping's value, a list's item."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        kind = field.annotation if field else None
        if get_origin(kind) in (Union, UnionType):
            kind = next((member for member in get_args(kind) if member is not type(None)), None)
        return kind
    if get_origin(kind) is Annotated:  # a union told apart by `kind`, which is the part
        members = get_args(get_args(kind)[0])
        return next((it for it in members if part in get_args(it.model_fields["kind"].annotation)), None)
    members = get_args(kind)
    return members[-1] if members else None


def _message(path: Path, tree: CommentedMap, at: Path_, text: str, overridden: list[Path_]) -> str:
    key = ".".join(map(str, at)) or "(the recipe)"
    if any(at[: len(item)] == item or tuple(map(str, at)) == tuple(map(str, item)) for item in overridden):
        return f"--set {key}: {text}"
    return f"{path}:{_line(tree, at)}: {key}: {text}"


def _line(tree: Any, at: Path_) -> int:
    """The line of the deepest key of the path that stands in the file."""
    line, node = 1, tree
    for part in at:
        try:
            where = node.lc.value(part) if isinstance(node, CommentedSeq) else node.lc.key(part)
            line, node = where[0] + 1, node[part]
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return line
