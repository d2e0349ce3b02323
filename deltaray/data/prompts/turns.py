"""The turns of one conversation as a user's file has them: plain ones, and those that call tools or report back. Pure.

Everything that compares, counts or shows prompts works on plain turns, {role, content}. What tools need besides
(`tool_calls`, `tool_call_id`, `name`, and the schemas of a row's `tools`) goes, with every other field of these turns,
into one text of JSON, untouched, and from there to the chat templates; so do thoughts of earlier answers.
"""

import json
import re
from typing import Any

from deltaray.text.depth import MOST_DEPTH, is_too_deep
from deltaray.text.words import short

Turn = dict[str, Any]
Tools = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
ASKING = ("user", "tool")
"""Who may speak last: the answer is the assistant's."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields in which a turn's thoughts may stand beside its text."""
CALLS = ("tool_calls", "function_call")
TOOL_FIELDS = (*CALLS, "tool_call_id", "name", *THOUGHTS)
TEXT_PARTS, THOUGHT_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")
"""Types of the parts of a turn's content that are read."""
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


class RowError(ValueError):
    """The row is not a prompt; the message says why, and what to do."""


def checked_turns(value: Any) -> list[Turn]:
    """The turns of `messages` with their fields. Nulls, which is how tables say that there is none, stay in `content`.

    Raises:
        RowError: they are not turns, or the last one leaves nothing to answer.
    """
    turns = turns_of(value, "messages")
    if turns[-1]["role"] not in ASKING:
        raise RowError("the last turn must be the user's, or a tool's; leave the answer out of `messages`")
    if turns[-1]["role"] == "user" and not (turns[-1]["content"] or "").strip():
        raise RowError("the user's last turn is empty; write the question")
    return turns


def turns_of(value: Any, column: str) -> list[Turn]:
    """As `checked_turns`, with any role last. `column`: its name, for messages.

    Raises:
        RowError: they are not turns.
    """
    if not isinstance(value, list) or not value:
        raise RowError(f"`{column}` must be a list of {{role, content}}")
    _refuse_deep(value, column)
    return [_checked(turn) for turn in value]


def _checked(turn: Any) -> Turn:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise _no_turn(turn)
    found = {name: item for name, item in turn.items() if not _is_none(item) or name == "content"}
    if isinstance(found.get("content"), list):
        text, thoughts = _from_parts(found["content"])
        if thoughts and any(found.get(name) for name in THOUGHTS):
            raise RowError("a turn has its thoughts both in `content` and beside it; keep one")
        found |= {"content": text} | ({THOUGHTS[0]: thoughts} if thoughts else {})
    has_more = any(found.get(name) for name in (*CALLS, *THOUGHTS))
    if not isinstance(found.get("content"), str) and not (has_more and _is_none(found.get("content"))):
        raise _no_turn(turn)
    if _is_none(found.get("content")):
        found["content"] = None
    _check_calls(found)
    return found


def _check_calls(turn: Turn) -> None:
    """RowError unless what a turn calls has the shape that templates, judges and tables read."""
    calls, call = turn.get("tool_calls") or [], turn.get("function_call")
    listed = calls if isinstance(calls, list) else [None]
    functions = [it.get("function", it) if isinstance(it, dict) else None for it in listed]
    for function in [*functions, *([call] if call else [])]:
        if not isinstance(function, dict) or not isinstance(function.get("name"), str | None):
            raise RowError(
                "`tool_calls` must be a list of calls, each {function: {name, arguments}}, not "
                f"{short(repr(calls or call))}"
            )


def _refuse_deep(value: Any, column: str) -> None:
    if is_too_deep(value):
        raise RowError(f"`{column}` is nested deeper than {MOST_DEPTH} levels")


def _no_turn(turn: Any) -> RowError:
    return RowError(f"a turn needs a role ({', '.join(ROLES)}) and text in `content`, not {short(repr(turn))}")


def _is_none(value: Any) -> bool:
    """Whether it is null, or NaN, which pandas writes for it."""
    return value is None or value != value


def _from_parts(parts: list[Any]) -> tuple[str, str]:
    """(text, thoughts) of content in parts.

    Raises:
        RowError: one of them is neither, such as an image.
    """
    text: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        field = "text" if kind in TEXT_PARTS else kind if kind in THOUGHT_PARTS else None
        value = None if field is None else part.get(field) if part.get(field) is not None else part.get("text")
        if not isinstance(value, str):
            what = f"of type {kind!r}" if isinstance(kind, str) else short(repr(part))
            raise RowError(f"a turn's `content` has a part {what}; only text can be asked and trained")
        (text if field == "text" else thoughts).append(value)
    return "".join(text), "".join(thoughts)


def thoughts_of(turn: Turn) -> str | None:
    """The thoughts that stand beside a turn's text.

    Raises:
        RowError: they are not text, or two fields say different things.
    """
    found = [turn[name] for name in THOUGHTS if turn.get(name)]
    if any(not isinstance(item, str) for item in found):
        raise RowError(f"thoughts ({', '.join(THOUGHTS)}) must be text")
    if len(set(found)) > 1:
        raise RowError(f"a turn has two different thoughts ({', '.join(name for name in THOUGHTS if turn.get(name))})")
    return found[0] if found and found[0].strip() else None


def refuse_written_turns(text: str, column: str) -> None:
    """RowError if a text is the JSON, or Python's way, of turns: as a text it would be taken word by word."""
    if _WRITTEN.match(text):
        raise RowError(f"`{column}` is text that holds turns; write turns as a list (JSON Lines or Parquet, not CSV)")


def with_system(turns: list[Turn], system: Any) -> list[Turn]:
    """The turns behind the text of a row's `system`, if there is one.

    Raises:
        RowError: it is not text, or the turns begin with another one.
    """
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise RowError(f"`system` must be text, not {short(repr(system))}")
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"] != system:
        raise RowError("`system` and the conversation's own system turn say different things; leave one of them out")
    return turns


def agrees(prompt: Any, turns: list[Turn]) -> bool:
    """Whether a row's `prompt` is nothing else than the turns: what the user says in them, or their beginning."""
    if prompt is None or prompt == "" or prompt == []:
        return True
    if isinstance(prompt, str):
        said = [(turn["content"] or "").strip() for turn in turns if turn["role"] == "user"]
        return prompt.strip() in (*said, "\n".join(said))
    return same_beginning(turns_of(prompt, "prompt"), turns)


def same_beginning(start: list[Turn], turns: list[Turn]) -> bool:
    """Whether turns begin with others: the same speakers say and call the same."""
    return [_said(turn) for turn in start] == [_said(turn) for turn in turns[: len(start)]]


def _said(turn: Turn) -> tuple[Any, ...]:
    return turn["role"], (turn["content"] or "").strip(), *(_bare(turn.get(name)) or None for name in CALLS)


def _bare(value: Any) -> Any:
    """A value without the nulls with which tables fill up what only some rows have."""
    if isinstance(value, dict):
        return {name: _bare(item) for name, item in value.items() if item is not None}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def checked_tools(value: Any) -> Tools | None:
    """A row's function schemas, which may be a list or its JSON.

    Raises:
        RowError: they are neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"`tools` is text, but no JSON: {error}") from None
    if not value:
        return None
    _refuse_deep(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"`tools` must be a list of function schemas, not {short(repr(value))}")
    return value


def plain_turns(turns: list[Turn]) -> list[dict[str, str]]:
    """Role and content alone; a turn that only calls tools has empty content."""
    return [{"role": turn["role"], "content": turn.get("content") or ""} for turn in turns]


def conversation_json(turns: list[Turn], tools: Tools | None) -> str | None:
    """`contracts.PROMPTS`'s `conversation`: all that plain turns leave out; None if no tool or thought is in it."""
    special = (turn["role"] == "tool" or any(turn.get(name) for name in TOOL_FIELDS) for turn in turns)
    if not tools and not any(special):
        return None
    return json.dumps({"messages": turns, "tools": tools}, ensure_ascii=False, default=str)


def full_turns(messages: list[Turn], conversation: str | None) -> tuple[list[Turn], Tools | None]:
    """(turns, tools) that a chat template is given for a stored prompt."""
    if conversation is None:
        return messages, None
    whole = json.loads(conversation)
    return whole["messages"], whole["tools"]
