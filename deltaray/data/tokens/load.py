"""The one place that loads tokenizers: of students, teachers, judges and reward models."""

import logging
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltaray.data.tokens.compare import difference, loses_text
from deltaray.data.tokens.templates import limit_templates
from deltaray.errors import PASSING, UserError, door, first_line
from deltaray.files import read_settings, read_small
from deltaray.imports import quick_imports
from deltaray.limits import TEMPLATE_BYTES
from deltaray.recipe.models import Model, is_there

log = logging.getLogger(__name__)

TOKENIZER, TEKKEN = "tokenizer.json", "tekken.json"
NAMING = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that may name tokens beyond those of `tokenizer.json`."""
CLOCK = "strftime_now"
"""What transformers gives chat templates to ask for the date."""


def load_tokenizer(model: Model, key: str) -> Any:
    """The tokenizer of a model as its files say, with its chat template and the recipe's arguments for that.

    Raises:
        UserError: it cannot be loaded, does not do what its `tokenizer.json` says, or has no chat template; `key`
            names the recipe's section.
    """
    with door(f"{key}.model", f"no tokenizer in {model.model!r}"):  # also what a model's own code raises
        tokenizer = as_the_files_say(model, key)
    tokenizer.chat_template = _template(tokenizer.chat_template, model, key)
    tokenizer.template_arguments = dict(model.chat_template_arguments)
    if model.date is not None and asks_for_the_date(tokenizer):
        tokenizer.template_arguments.setdefault(CLOCK, date.fromisoformat(model.date).strftime)
    return tokenizer


def asks_for_the_date(tokenizer: Any) -> bool:
    """Whether a chat template writes the day of its rendering."""
    return CLOCK in str(tokenizer.chat_template)


def is_replaced(tokenizer: Any) -> bool:
    """Whether transformers, left alone, would build another tokenizer from the same files."""
    return bool(getattr(tokenizer, "replaces", False))


# --- as the files say -------------------------------------------------------------------------------------------
def as_the_files_say(model: Model, key: str) -> Any:
    """AutoTokenizer's where that does what `tokenizer.json` says, else one built straight from the file.

    Raises:
        UserError: neither does. Also what transformers raises where there is no tokenizer.
    """
    limit_templates()
    file = model_file(model, TOKENIZER)
    if file is None and (tekken := model_file(model, TEKKEN)) is not None:
        return _marked(_of_tekken(tekken))
    try:
        tokenizer = _by_transformers(model)
        wrong = _wrong(tokenizer, model, file)
    except PASSING:
        raise
    except BaseException as error:  # tokenizers may panic
        if file is None or "trust_remote_code" in str(error):
            raise
        tokenizer, wrong = None, first_line(error)
    if wrong is None:
        return tokenizer
    if file is None:
        raise UserError(f"{key}.model: the tokenizer of {model.model!r} {wrong}; give the model a {TOKENIZER}")
    straight = _straight(model)
    if still := _wrong(straight, model, file):
        raise UserError(
            f"{key}.model: the tokenizer of {model.model!r} cannot be built as its {TOKENIZER} says: {still}; correct "
            "its tokenizer_config.json"
        )
    _say_once(
        f"{key}.model: the tokenizer of {model.model!r} is read from {TOKENIZER} alone: transformers makes another of "
        f"it: {wrong}"
    )
    return _marked(straight)


def _by_transformers(model: Model) -> Any:
    with quick_imports():
        from transformers import AutoTokenizer

    # not as mistral_common's, which takes no chat templates, where a repository has its files beside Hugging Face's
    return AutoTokenizer.from_pretrained(
        model.model, revision=model.revision, trust_remote_code=model.trust_remote_code, mistral_format=False
    )


def _straight(model: Model) -> Any:
    """Special tokens, templates and settings of the folder around the file's tokenizer as it is."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(model.model, revision=model.revision)


def _of_tekken(path: str) -> Any:
    """A repository with Mistral's own file alone; its template comes from there, or mistral_common writes it."""
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    return convert_tekken_tokenizer(path)


def _marked(tokenizer: Any) -> Any:
    tokenizer.replaces = True
    return tokenizer


def _wrong(tokenizer: Any, model: Model, file: str | None) -> str | None:
    """What a tokenizer does otherwise than its file says; a model's own code, once trusted, may do as it likes."""
    if not type(tokenizer).__module__.startswith("transformers."):
        return None
    if file is None or not tokenizer.is_fast:
        return "loses the spaces between words" if loses_text(tokenizer) else None
    paths = [file, *(path for name in NAMING if (path := model_file(model, name)))]
    stamp = tuple((path, Path(path).stat().st_mtime_ns, Path(path).stat().st_size) for path in paths)
    built = (type(tokenizer).__qualname__, *stamp)
    if built not in COMPARED:
        COMPARED[built] = _compared(tokenizer, paths)
    return COMPARED[built]


COMPARED: dict[tuple[Any, ...], str | None] = {}
"""What was found in this process, by class of transformers and files."""


def _compared(tokenizer: Any, paths: list[str]) -> str | None:
    from tokenizers import Tokenizer

    named = [read_settings(Path(path)) for path in paths[1:]]
    prefixed = any(isinstance(it.get("add_prefix_space"), bool) for it in named)
    texts = frozenset(text for it in named for text in _strings(it))
    return difference(tokenizer, Tokenizer.from_file(paths[0]), texts, prefixed)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from (text for item in value.values() for text in _strings(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in _strings(item))


def model_file(model: Model, name: str) -> str | None:
    """A file of a model's folder, or of its repository on the hub; None where there is none."""
    from transformers.utils import cached_file

    found = cached_file(
        model.model,
        name,
        revision=model.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else str(found)


@lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    log.warning(text)


# --- chat templates ---------------------------------------------------------------------------------------------
def _template(own: Any, model: Model, key: str) -> Any:
    """The template that the recipe names, in a file or among the tokenizer's own; else the tokenizer's own.

    A tokenizer may have several by name. transformers takes `tool_use` for prompts with tools and `default` otherwise.
    """
    several = own if isinstance(own, dict) else {}
    wanted, names = model.chat_template, ", ".join(sorted(several))
    if wanted is not None and is_there(wanted):
        with door(f"{key}.chat_template: {wanted}", "is not text in UTF-8"):
            return read_small(Path(wanted), TEMPLATE_BYTES).decode()
    if wanted is not None:
        if wanted in several:
            return several[wanted]
        others = f"; the tokenizer has templates of its own: {names}" if names else ""
        raise UserError(f"{key}.chat_template: there is no file {wanted!r}{others}")
    if not own:
        raise UserError(
            f"{key}.model: the tokenizer of {model.model!r} has no chat template; name a Jinja file in "
            f"{key}.chat_template, or use the instruction-tuned model"
        )
    if several and "default" not in several:
        raise UserError(
            f"{key}.model: the tokenizer of {model.model!r} has several chat templates and none is the default; name "
            f"one in {key}.chat_template: {names}"
        )
    return own
