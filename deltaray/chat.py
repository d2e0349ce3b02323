"""The one owner of chat text <-> token ids. Generation, reference pass and training all render through here."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError

from deltaray.errors import first_line
from deltaray.prompts.turns import short
from deltaray.tokenizer.control import system_refusal
from deltaray.tokenizer.render import ControlTokenError, foreign_tokens, rendered_ids

Message = dict[str, Any]
"""One turn: `role`, `content`, and where tools are used what else the chat template reads."""
Tools = Sequence[dict[str, Any]]
"""Function schemas that a template is given beside the turns."""


class NotShownError(TemplateError):
    """The template leaves out a system turn, or what tools were asked or said."""


def prompt_ids(tokenizer: Any, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
    """Ids of the prompt up to where the assistant starts to speak, special tokens as the template writes them.

    Raises:
        NotShownError: the template does not write a tool's name, a call, a tool's answer or the system turn.
        ControlTokenError: a turn holds control tokens that cannot be kept as text.
    """
    if told := list(_told_by_tools(messages, tools)):
        _refuse_unshown(tokenizer, messages, tools, told)
    if messages[0]["role"] == "system" and (refusal := system_refusal(tokenizer)):
        raise NotShownError(refusal)
    return rendered_ids(tokenizer, messages, add_generation_prompt=True, **_given(tools))


def prompts_ids(
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
        return prompt_ids(tokenizer, messages, tools), None
    except (NotShownError, ControlTokenError) as error:
        return [], str(error)
    except Exception as error:  # templates raise what they like
        return [], f"the chat template refuses it: {first_line(error)}"


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
    """As it is, as JSON quotes it, or, where it is JSON itself, all texts in it: some templates lay that out anew."""
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


# --- with responses ---------------------------------------------------------------------------------------------
def conversation_ids(
    tokenizer: Any, messages: Sequence[Message], responses: Sequence[str], tools: Tools | None = None
) -> tuple[list[int], list[list[int]]]:
    """(prompt ids, ids of each response to it); a response ends with its end token and nothing after it.

    Raises:
        ValueError: the template renders the prompt differently once an answer follows, so that training would see
            other tokens than generation did.
        NotShownError: as `prompt_ids`.
    """
    prompt = prompt_ids(tokenizer, messages, tools)
    answers = ({"role": "assistant", "content": text} for text in responses)
    full = [list(_render(tokenizer, [*messages, answer], **_given(tools))) for answer in answers]
    if any(ids[: len(prompt)] != prompt for ids in full):
        raise ValueError("the chat template's prompt is no prefix of prompt and response")
    return prompt, [end_at_eos(ids[len(prompt) :], tokenizer.eos_token_id) for ids in full]


def end_at_eos(ids: list[int], eos: int) -> list[int]:
    """Cuts what a template writes after the last end token (a line break, say); adds one where there is none."""
    for position in range(len(ids) - 1, -1, -1):
        if ids[position] == eos:
            return ids[: position + 1]
    return [*ids, eos]
