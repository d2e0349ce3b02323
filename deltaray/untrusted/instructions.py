"""In the process beside: IFEval's checkers, with the expressions and counts of a data set on texts of models."""

from typing import Any

from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_strict

from deltaray.failures import reason_of


def followed(ids: list[str], arguments: list[dict[str, Any]], prompt: str, text: str) -> list[bool] | str:
    """Which instructions a text follows, or why that cannot be told."""
    try:
        example = InputExample(0, ids, prompt, arguments)
        return [bool(it) for it in test_instruction_following_strict(example, text).follow_instruction_list]
    except LookupError as error:  # an unknown id, or nltk's punkt_tab that cannot be fetched from here
        return f"not checkable: {reason_of(error)}"
    except (TypeError, ValueError) as error:
        return f"arguments do not fit: {error}"
