"""The one place that loads tokenizers: of students, teachers, judges and reward models."""

from pathlib import Path
from typing import Any

from deltaray.errors import UserError, first_line
from deltaray.imports import quick_imports
from deltaray.recipe.models import Model


def load_tokenizer(model: Model, key: str) -> Any:
    """The tokenizer of a teacher or student, with its chat template.

    Raises:
        UserError: it cannot be loaded or has no chat template; `key` names the recipe's section.
    """
    with quick_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{key}.model: no tokenizer in {model.model!r}: {first_line(error)}") from None
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(model.chat_template, key)
    if not tokenizer.chat_template:
        raise UserError(
            f"{key}.model: the tokenizer of {model.model!r} has no chat template; name a Jinja file in "
            f"{key}.chat_template, or use the instruction-tuned model"
        )
    tokenizer.template_arguments = dict(model.chat_template_arguments)
    return tokenizer


def _read_template(path: str, key: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{key}.chat_template: there is no file {path!r}")
    return Path(path).read_text(encoding="utf-8")
