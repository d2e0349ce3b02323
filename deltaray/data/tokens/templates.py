"""Chat templates come with models, and a template is a program: all that render in this process do it with limits.

transformers renders all of them by one function, for tokenizers and processors, also when the harness or vLLM calls it.
It is replaced by one that asks a process beside this one (`deltaray.untrusted`), where the same function runs.
"""

import sys
from collections import Counter
from typing import Any

from deltaray.untrusted import OverLimitError, limited

SECONDS = 2.0
"""Of computing for one conversation; templates of published models take a few milliseconds."""
PATIENCE, HURRIED = 8, 0.2
"""A template that went over its limits so often gets only these seconds: a study has millions of rows."""

_overruns: Counter[str] = Counter()
"""How often each template has gone too far in this process."""


def limit_templates() -> None:
    """From now on transformers renders with limits in this process."""
    from transformers import tokenization_utils_base
    from transformers.utils import chat_template_utils

    for module in (chat_template_utils, tokenization_utils_base, sys.modules.get("transformers.processing_utils")):
        if module is not None:
            vars(module)["render_jinja_template"] = render


def render(
    conversations: list[Any], tools: Any = None, chat_template: str | None = None, **options: Any
) -> tuple[list[str], list[Any]]:
    """As transformers' `render_jinja_template`, one conversation after the other.

    Raises:
        OverLimitError: a conversation takes too much time, memory or output.
    """
    from transformers.utils.chat_template_utils import get_json_schema

    tools = tools and [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
    texts, spoken = list[str](), list[Any]()
    for conversation in conversations:
        turns = getattr(conversation, "messages", conversation)
        given = options | {"conversations": [turns], "tools": tools, "chat_template": chat_template}
        text, places = _one(given, str(chat_template))
        texts += text
        spoken += [[tuple(place) for place in found] for found in places]
    return texts, spoken


def _one(given: dict[str, Any], template: str) -> Any:
    seconds = SECONDS if _overruns[template] < PATIENCE else HURRIED
    try:
        return limited("deltaray.untrusted.templates", SECONDS).call("render", given, seconds=seconds)
    except OverLimitError:
        _overruns[template] += 1
        raise
