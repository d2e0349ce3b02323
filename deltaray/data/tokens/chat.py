"""The one owner of chat text <-> token ids. Generation, reference pass and training all render through here."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from deltaray.data.tokens.control import system_refusal
from deltaray.data.tokens.render import ControlTokenError, foreign_tokens, rendered_ids
from deltaray.failures import reason_of
from deltaray.text.words import short

Message = dict[str, Any]
"""One turn: `role`, `content`, and where tools are used what else the chat template reads."""
Tools = Sequence[dict[str, Any]]
"""Function schemas that a template is given beside the turns."""


class RefusedError(Exception):
    """The template has no place for a prompt or a response."""


class NotShownError(RefusedError):
    """The template leaves out a system turn, or what tools were asked or said."""


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
    """Ids of the prompt up to where the assistant starts to speak, special tokens as the template writes them.

    Some templates want the arguments of tool calls as an object, others as its JSON: where the template raises on the
    one, it is given the other.

    Raises:
        NotShownError: the template does not write a tool's name, a call, a tool's answer or the system turn.
        ControlTokenError: a turn holds control tokens that cannot be kept as text.
    """
    try:
        return _prompt_ids(tokenizer, messages, tools)
    except NotShownError:
        raise
    except Exception:
        other = [_with_other_arguments(turn) for turn in messages]
        if other == list(messages):
            raise
        return _prompt_ids(tokenizer, other, tools)


def _prompt_ids(tokenizer: Any, messages: Sequence[Message], tools: Tools | None) -> list[int]:
    if told := list(_told_by_tools(messages, tools)):
        _refuse_unshown(tokenizer, messages, tools, told)
    if messages[0]["role"] == "system" and (refusal := system_refusal(tokenizer)):
        raise NotShownError(refusal)
    return rendered_ids(tokenizer, messages, add_generation_prompt=True, **_given(tools))


def _with_other_arguments(turn: Message) -> Message:
    """A turn whose calls have objects as arguments in place of JSON texts, or JSON texts in place of objects."""
    if not turn.get("tool_calls"):
        return turn
    return turn | {"tool_calls": [_with_other_form(call) for call in turn["tool_calls"]]}


def _with_other_form(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_other_form(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, dict):
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    with suppress(ValueError, TypeError, RecursionError):
        if isinstance(parsed := json.loads(arguments or ""), dict):
            return call | {"arguments": parsed}
    return call


def render_prompts(
    tokenizer: Any, prompts: Sequence[list[Message]], tools: Sequence[Tools | None] | None = None
) -> tuple[list[list[int]], list[str | None]]:
    """(ids, refusals) of many prompts: one that the template or the tokenizer refuses has no ids but its reason."""
    each = list(zip(prompts, tools or [None] * len(prompts), strict=True))
    if not any(given or _is_special(tokenizer, turns) for turns, given in each):
        with suppress(Exception):  # all at once is several times faster; one by one it shows whose fault it is
            ids = _render(tokenizer, list(prompts), add_generation_prompt=True)
            return [list(of_one) for of_one in ids], [None] * len(each)
    results = [_ids_or_refusal(tokenizer, *prompt) for prompt in each]
    return [ids for ids, _ in results], [refusal for _, refusal in results]


def _is_special(tokenizer: Any, turns: list[Message]) -> bool:
    """Whether a prompt has to be looked at by itself."""
    refused = turns[0]["role"] == "system" and system_refusal(tokenizer)
    return bool(refused or any(_told_by_tools(turns, None)) or foreign_tokens(tokenizer, turns))


def _ids_or_refusal(tokenizer: Any, messages: list[Message], tools: Tools | None) -> tuple[list[int], str | None]:
    try:
        return render_prompt(tokenizer, messages, tools), None
    except BaseException as error:
        return [], refusal_of(error)


def refusal_of(error: BaseException) -> str:
    """Why a template or a tokenizer refuses a row; templates raise what they like.

    Raises:
        BaseException: the error itself, where it concerns more than the row (an interrupt, say).
    """
    if isinstance(error, RefusedError | ControlTokenError):
        return str(error)
    return f"the chat template refuses it: {reason_of(error)}"


def _render(tokenizer: Any, messages: Any, tokenize: bool = True, **options: Any) -> Any:
    arguments = getattr(tokenizer, "template_arguments", {}) | options
    return tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=False, **arguments)


def _given(tools: Tools | None) -> dict[str, Any]:
    return {"tools": list(tools)} if tools else {}


# --- what tools ask and say -------------------------------------------------------------------------------------
def _refuse_unshown(tokenizer: Any, messages: Sequence[Message], tools: Tools | None, told: list[str]) -> None:
    """A template that knows no tools would lose such turns without a word."""
    shown = _render(tokenizer, list(messages), tokenize=False, add_generation_prompt=True, **_given(tools))
    for text in told:
        if not _is_shown(text, shown):
            raise NotShownError(f"the chat template leaves out what tools ask or say: {short(text)!r}")


def _is_shown(text: str, shown: str) -> bool:
    """As it is, as JSON quotes it, or, where it is JSON itself, all texts in it: some templates lay that out again."""
    if text in shown or any(json.dumps(text, ensure_ascii=pure)[1:-1] in shown for pure in (False, True)):
        return True
    try:
        inside = list(_strings_in(json.loads(text)))
    except (ValueError, RecursionError):
        return False
    return bool(inside) and all(_is_shown(item, shown) for item in inside if item != text)


def _told_by_tools(messages: Sequence[Message], tools: Tools | None) -> Iterator[str]:
    """Texts that every template which knows tools writes: names, arguments, what tools answered."""
    yield from (name for tool in tools or () if (name := _name_of(tool)))
    for turn in messages:
        if turn["role"] == "tool":
            yield turn["content"].strip()
        for call in turn.get("tool_calls") or ():
            yield _name_of(call)
            yield from _strings_in(call.get("function", call).get("arguments"))


def _name_of(described: dict[str, Any]) -> str:
    return str(described.get("function", described).get("name") or "")


def _strings_in(value: Any) -> Iterator[str]:
    """The texts inside a call's arguments, or all of them where they are one text."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(item)
