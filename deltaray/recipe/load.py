"""From a YAML file and `--set` overrides to a checked `Recipe`; every refusal names file, line, key and what to do."""

import codecs
import io
import json
import re
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from deltaray.errors import UserError, door
from deltaray.limits import RECIPE_BYTES, RECIPE_DEPTH
from deltaray.recipe.check import check_recipe
from deltaray.recipe.kinds import mixed_up
from deltaray.recipe.models import is_there
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.renamed import RENAMED
from deltaray.recipe.secrets import OUTSIDE, line_with_secret, named_variables, secrets_in, variables_in
from deltaray.recipe.shipped import recipe_folder
from deltaray.recipe.yaml import CORRECT, Document, Path_, YamlError, read_yaml
from deltaray.text import keep_secret, known_secrets, without_secrets
from deltaray.text.words import short

KEY_PATH = re.compile(r"[A-Za-z_][\w.-]{0,200}")
"""What a message of an override shows of it."""


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads, overrides and checks a recipe.

    Raises:
        UserError: one line per problem, `file:line: key.path: what is wrong, what to write instead`.
    """
    overrides = overrides or []
    with door(str(path)):
        text = _text_of(path)
    variables = named_variables("\n".join([text, *overrides]))
    try:
        return _load(path, text, overrides, variables)
    except UserError as error:  # whatever it quotes
        raise UserError(without_secrets(str(error), known_secrets(variables))) from None


def _load(path: Path, text: str, overrides: list[str], variables: set[str]) -> Recipe:
    document = _document(path, text)
    plain = document.value
    overridden = [_override(plain, item) for item in overrides]
    _find_templates(plain, (path.parent, recipe_folder()))
    variables |= variables_in(plain)
    known = known_secrets(variables)
    found = list(secrets_in(plain, known))  # first: other messages quote what they refuse
    if not found and (line := line_with_secret(text, known)):
        raise UserError(f"{path}:{line}: {OUTSIDE}")
    found = found or list(mixed_up(plain, Recipe))
    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        found = found or [(_real_path(plain, issue["loc"]), _explain(issue)) for issue in error.errors()]
    else:
        found = found or list(check_recipe(recipe))
        if not found:
            keep_secret(variables)
            return recipe
    first_of_each = dict(reversed(found))  # a union reports once per member
    lines = [_message(path, document, at, text, overridden) for at, text in first_of_each.items()]
    raise UserError("\n".join(reversed(lines)))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    buffer = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(recipe.model_dump(mode="json"), buffer)
    return buffer.getvalue()


def _document(path: Path, text: str) -> Document:
    try:
        document = read_yaml(text)
    except YamlError as error:
        raise UserError(f"{path}:{error.line}: {error.text}") from None
    if not isinstance(document.value, dict):
        raise UserError(f"{path}:1: a recipe is a mapping of keys (name, out, prompts, teachers, …)")
    return document


def _text_of(path: Path) -> str:
    """What stands in a recipe's file. A device or a pipe is none: it may never end."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such recipe; give the path of a YAML file")
    with path.open("rb") as file:
        content = file.read(RECIPE_BYTES + 1)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: not UTF-8 text but UTF-16; save it as UTF-8")
    if len(content) > RECIPE_BYTES:
        raise UserError(f"{path}: is larger than {RECIPE_BYTES:,} bytes, which no recipe needs; is it another file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _override(tree: Any, item: str) -> Path_:
    """Applies one `key.path=value`; the value is YAML, so numbers, lists and null work. Messages quote no value."""
    key, equals, text = item.partition("=")
    shown = f"--set {short(key)}" if KEY_PATH.fullmatch(key.strip()) else "--set"
    path = key.strip().split(".")
    if not equals or not all(path) or len(path) > RECIPE_DEPTH:
        raise UserError(f"{shown}: write key.path=value, for example --set training.workers=2")
    try:
        value = read_yaml(text).value if text.strip() else None
        read_yaml(json.dumps(key))
    except YamlError as error:
        what = error.text.removesuffix(CORRECT) + "put quotes around it" if CORRECT in error.text else error.text
        raise UserError(f"{shown}: {what}") from None
    node, at = tree, list[str | int]()
    for part in path[:-1]:
        so_far = ".".join(map(str, [*at, part]))
        at.append(_place(node, part))
        node = _descend(node, at[-1], shown, so_far)
    at.append(_place(node, path[-1]))
    _assign(node, at[-1], value, shown)
    return tuple(at)


def _find_templates(node: Any, folders: tuple[Path, ...]) -> None:
    """Templates that are not where deltaray was started are looked for in these folders: beside the recipe, and among
    those that come with deltaray."""
    if isinstance(node, dict):
        name = node.get("chat_template")
        if isinstance(name, str) and name and not is_there(name):
            found = [str(folder / name) for folder in folders if is_there(str(folder / name))]
            node["chat_template"] = _from_here(found[0]) if found else name
    for inside in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _find_templates(inside, folders)


def _from_here(path: str) -> str:
    """A path relative to this folder where it lies below it, so that it can travel with a job."""
    whole = Path(path).absolute()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)


def _place(node: Any, part: str) -> str | int:
    """A part of a key path as it leads on from here: of a list a number."""
    return int(part) if isinstance(node, list) and part.isascii() and part.isdigit() and len(part) < 6 else part


def _descend(node: Any, part: str | int, where: str, so_far: str) -> Any:
    if isinstance(node, list) and isinstance(part, int) and part < len(node):
        return node[part]
    if isinstance(node, dict):
        if node.get(str(part)) is None:
            node[str(part)] = {}
        return node[str(part)]
    raise UserError(f"{where}: {so_far} is not a section that holds keys")


def _assign(node: Any, part: str | int, value: Any, where: str) -> None:
    if isinstance(node, list) and isinstance(part, int) and part < len(node):
        node[part] = value
    elif isinstance(node, dict):
        node[str(part)] = value
    else:
        raise UserError(f"{where}: the key cannot be set there: the one before it is not a section that holds keys")


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
        return f"{_shown(issue)} is not allowed; write {context['expected']}"
    if kind == "union_tag_not_found":
        return "`kind` is missing; add it"
    if kind == "union_tag_invalid":
        return f"kind {short(repr(context['tag']))} is not allowed; write one of: {context['expected_tags']}"
    if kind == "value_error":
        return f"{_shown(issue)} is not allowed; write {context['error']}"
    if kind == "string_pattern_mismatch":
        return f"{_shown(issue)}: use letters, digits, '.', '_' and '-' only"
    message = (issue["msg"][0].lower() + issue["msg"][1:]).partition(", unable to parse")[0]
    message = message.replace("valid integer", "whole number")
    return f"{_shown(issue)}: {message.replace('input should be', 'write').replace('valid ', '')}"


def _shown(issue: Any) -> str:
    return short(repr(issue["input"]))


def _unknown_key(loc: Path_) -> str:
    if new := RENAMED.get(str(loc[-1])):
        return f"unknown key; it is called {new!r} now"
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


def _message(path: Path, document: Document, at: Path_, text: str, overridden: list[Path_]) -> str:
    key = short(".".join(map(str, at))) or "(the recipe)"
    made = at not in document.lines  # an override made the section, too
    if any(at[: len(item)] == item or (made and item[: len(at)] == at) for item in overridden):
        return f"--set {key}: {text}"
    return f"{path}:{document.line(at)}: {key}: {text}"
