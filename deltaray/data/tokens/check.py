"""What can be known of a model's tokenizer and template before anything runs, without weights."""

import logging
from pathlib import Path
from typing import Any

from deltaray.data.tokens.control import ANSWERED, ASKED, TOLD, system_refusal, turn_end, written
from deltaray.data.tokens.load import load_tokenizer, model_file
from deltaray.errors import UserError
from deltaray.files import read_settings
from deltaray.recipe.models import Model, Student, Teacher
from deltaray.recipe.scorers import RewardModel
from deltaray.untrusted import OverLimitError

log = logging.getLogger(__name__)


def check_tokenizer(model: Model, key: str) -> Any:
    """The tokenizer: it loads, its template renders what this model is asked, and answers have an end.

    Raises:
        UserError: with what to do; `key` names the recipe's section.
    """
    tokenizer = load_tokenizer(model, key)
    turns = [*_needed(tokenizer, key), ("user", ASKED)]
    _check_shown(tokenizer, key, turns, add_generation_prompt=True)
    if isinstance(model, Student | RewardModel):
        _check_shown(tokenizer, key, [*turns, ("assistant", ANSWERED)])
    _check_system(tokenizer, model, key)
    _check_end(tokenizer, model, key)
    if isinstance(tokenizer.chat_template, dict):
        names = ", ".join(sorted(tokenizer.chat_template))
        log.warning(
            f"{key}.chat_template: {model.model!r} has several templates ({names}); `default` is taken, and `tool_use` "
            "where there are tools; name one to change that"
        )
    return tokenizer


def _check_shown(tokenizer: Any, key: str, turns: list[tuple[str, str]], **options: Any) -> None:
    try:
        text = written(tokenizer, *turns, **options)
    except ValueError as error:
        raise UserError(_refused(key, error)) from None
    for role, content in turns:
        if content not in text:
            raise UserError(
                f"{key}: the chat template leaves out what the {role} says; correct it, or name another in "
                f"{key}.chat_template"
            )


def _refused(key: str, error: ValueError) -> str:
    return f"{key}: {error}; correct it, or name another in {key}.chat_template"


def _needed(tokenizer: Any, key: str) -> list[tuple[str, str]]:
    """The system turn without which the template takes no prompt; none, as a rule."""
    try:
        written(tokenizer, ("user", ASKED), add_generation_prompt=True)
    except OverLimitError as error:  # it will not do better with another turn
        raise UserError(_refused(key, error)) from None
    except ValueError:
        return [] if system_refusal(tokenizer) else [("system", TOLD)]
    return []


def _check_system(tokenizer: Any, model: Model, key: str) -> None:
    """A template may refuse system turns or leave them out. That is a mistake where the recipe writes one."""
    reason = system_refusal(tokenizer)
    if reason and isinstance(model, Teacher) and model.system:
        raise UserError(f"{key}.system: {reason}; leave `system` out, or name another template in {key}.chat_template")
    if reason:
        log.warning(f"{key}: {reason}; prompts that have one fail with this reason")


def _check_end(tokenizer: Any, model: Model, key: str) -> None:
    """A student is trained to end its answers, and a teacher must come to an end; a reward model reads them only."""
    if isinstance(model, RewardModel):
        return
    try:
        end = tokenizer.convert_ids_to_tokens(turn_end(tokenizer))
    except ValueError:
        end = None
    if isinstance(model, Student) and tokenizer.eos_token_id is None:
        raise UserError(
            f'{key}.model: the tokenizer of {model.model!r} has no end token: write `"eos_token": '
            f'"{end or "…"}"` into its tokenizer_config.json'
            + ("" if end else ", with the token that ends the model's answers")
        )
    if end is None and not _stated_ends(model):
        raise UserError(
            f"{key}.model: nothing says where answers of {model.model!r} end: neither its chat template, nor its "
            "tokenizer, nor its generation_config.json; write the token's id there as `eos_token_id`"
        )


def _stated_ends(model: Model) -> bool:
    """Whether the model's own settings name tokens that end an answer."""
    for name in ("generation_config.json", "config.json"):
        path = model_file(model, name)
        if path and read_settings(Path(path)).get("eos_token_id") is not None:
            return True
    return False
