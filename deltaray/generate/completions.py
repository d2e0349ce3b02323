"""OpenAI's chat completions as JSON: requests from units, outputs from replies, what follows from a failure. Pure."""

import dataclasses
import email.utils
import json
import random
import time
from collections.abc import Mapping
from typing import Any

from deltaray.generate.finish import finish_of
from deltaray.generate.requests import Output, failed, readable, request_seed
from deltaray.runtime.server import Reply

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before the first repeat of a request; doubled up to the longest
LONGEST_WAIT = 3600.0  # seconds that a server may ask to wait; one that wants more has run out of a quota
LARGEST_SEED = 2**31 - 1  # servers differ in what integer they take; all take 31 bits
REFUSALS = (401, 402, 404)  # no such key, no money, no such model: every other row would hear the same
LONGEST_CODE = 12
"""Characters of an error's code that are looked at."""
MOST_TOKENS = 2**31 - 1
LONGEST_TOKEN = 256
"""Characters of one token: a text of more cannot be what was asked for."""
PASSING = (408, 409, 425, 429)  # these and the server's errors may be gone at the next try


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Why a request has no answer."""

    words: str
    again: bool  # whether it is worth repeating
    everybody: bool = False  # whether, once it is not repeated any more, other requests would fare no better
    wait: float = 0.0  # seconds that the server asks everybody to wait


def trouble_in(reply: Reply, answered: bool) -> Trouble | None:
    """What follows from a reply that is not an answer, or from an error inside one with a status of its own. Pure.

    A 403 or a redirect is everybody's until the server has `answered` somebody: some say 403 of a prompt that they
    will not see.
    """
    body = reply.body
    if reply.status >= 400:
        code = _inner(body).get("code")
        return _trouble(
            f"HTTP {reply.status}: {_said(reply)}", reply.status, code, answered, retry_after(reply.headers)
        )
    if reply.status >= 300:
        there = reply.headers.get("location", "nowhere")
        words = (
            f"HTTP {reply.status}: the server sends on to {there}; write that address as `url` if it is the right one"
        )
        return Trouble(words, again=False, everybody=not answered)
    choices = body.get("choices") if isinstance(body, Mapping) else None
    for part in (body, choices[0] if isinstance(choices, list) and choices else None):
        code = str(_inner(part).get("code"))[:LONGEST_CODE]
        if code.isdecimal() and 400 <= int(code) < 600:
            return _trouble(str(error_inside(part)), int(code), None, answered, 0.0)
    return None


def _inner(part: Any) -> Mapping[str, Any]:
    """The object `error` inside a part of a reply; empty if there is none."""
    error = part.get("error") if isinstance(part, Mapping) else None
    return error if isinstance(error, Mapping) else {}


def _trouble(words: str, status: int, code: Any, answered: bool, wait: float) -> Trouble:
    if status in REFUSALS or (status == 403 and not answered) or code == "insufficient_quota":
        return Trouble(words, again=False, everybody=True)
    if status not in PASSING and status < 500:
        return Trouble(words, again=False)
    return Trouble(words, again=wait <= LONGEST_WAIT, everybody=wait > LONGEST_WAIT, wait=wait)


def _said(reply: Reply) -> str:
    """The message in a server's error, or all of it."""
    body = reply.body.get("error", reply.body) if isinstance(reply.body, Mapping) else reply.body
    said = body.get("message") if isinstance(body, Mapping) else body
    return str(said or body or reply.text)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait (0 if it does not), given as seconds or as a date of its own clock."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        until, now = _date(value), _date(headers.get("date", ""))
        seconds = until - (time.time() if now is None else now) if until is not None else 0.0
    return max(seconds, 0.0) if seconds == seconds else 0.0  # not for nan


def _date(value: str) -> int | None:
    try:
        parsed = email.utils.parsedate_tz(value)
        return email.utils.mktime_tz(parsed) if parsed else None
    except (ValueError, OverflowError, TypeError):  # the 99th of a month, a year with a thousand digits
        return None


def pause_before(attempt: int) -> float:
    """Seconds to pause after failure number `attempt` (from 0): doubled each time; drawn, so that repeats spread."""
    return min(FIRST_PAUSE * 2.0 ** min(attempt, 30), LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def request_body(unit: Mapping[str, Any], place: int, sample: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON that asks for one answer of a unit's prompt. Pure.

    The sampling comes in vLLM's words; what is off (no stop strings, top_k 0) is not sent, for servers of others do
    not know all of it. `extra` has the last word, and its nulls drop fields.
    """
    fields = json.loads(unit["sampling"])
    base = fields.pop("seed", 0)
    if base is not None and fields.get("temperature", 1.0) > 0:
        fields["seed"] = request_seed(base, unit["prompt_ids"][place], sample) & LARGEST_SEED
    if fields.get("top_k", 0) <= 0:
        fields.pop("top_k", None)
    if not fields.get("stop"):
        fields.pop("stop", None)
    asked = {"model": unit["model"], "messages": unit["messages"][place], "tools": unit["tools"][place]}
    body = asked | fields | dict(extra)
    return {name: value for name, value in body.items() if value is not None}


def output_of(reply: Any, split: bool, most: int | None = None) -> Output:
    """Ours from a chat completion's JSON; ValueError if it is none. Pure.

    Args:
        split: the model thinks, so that `</think>` in the text ends its reasoning (if the server left it there).
        most: tokens that were asked for at most; they tell how an answer ended of which the server does not say it.
    """
    choice, message = _only_choice(reply)
    text, refusal = message.get("content"), message.get("refusal")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    tokens = _tokens(reply)
    reason, words = finish_of(choice.get("finish_reason"), tokens, most)
    if inner := error_inside(choice):
        return failed(f"{words or 'the answer holds an error'}: {inner}")
    if words is not None:
        return failed(f"{words}: {refusal}" if refusal else words)
    if not isinstance(text, str | None) or not isinstance(reasoning, str | None):
        return failed("the server's answer is not one text")
    if not text and refusal:
        return failed(f"the server refused: {refusal}")
    if calls := message.get("tool_calls"):
        return failed(f"the server ended the answer with a call of a tool, which nobody here answers: {calls}")
    text = text or ""
    if most is not None and (length := len(text) + len(reasoning or "")) > LONGEST_TOKEN * max(most, tokens):
        return failed(f"the server's answer has {length:,} characters, more than {most:,} tokens can have")
    if split and not reasoning:
        text, reasoning = split_reasoning(text)
    answer = readable(text.lstrip() if reasoning else text)  # white space at the seam belongs to the template
    reasoning = readable(reasoning.strip()) if reasoning else None
    fields = {"text": answer, "reasoning": reasoning, "finish_reason": reason, "error": None}
    return {"token_ids": [], "tokens": tokens, **fields}


def _only_choice(reply: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(the choice, its message); ValueError unless there is exactly one, as was asked for."""
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or not choices:
        raise ValueError(error_inside(reply) or f"no chat completion: {json.dumps(reply)}")
    if len(choices) > 1:
        raise ValueError(f"{len(choices)} choices where one was asked for")
    message = choices[0].get("message") if isinstance(choices[0], Mapping) else None
    if not isinstance(message, Mapping | None) or not isinstance(choices[0], Mapping):
        raise ValueError(f"no chat completion: {json.dumps(reply)}")
    return choices[0], message or {}


def _tokens(reply: Mapping[str, Any]) -> int:
    """How many tokens the server has counted; 0 if it has not; ValueError for what is not a count."""
    usage = reply.get("usage")
    found = usage.get("completion_tokens") if isinstance(usage, Mapping) else usage
    if found is None:
        return 0
    whole = isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found <= MOST_TOKENS
    if not whole or found != int(found):
        raise ValueError(f"usage.completion_tokens is not a number of tokens: {json.dumps(found)}")
    return int(found)


def most_tokens(body: Mapping[str, Any]) -> int | None:
    """How many tokens a request asks for at most. Pure."""
    found = body.get("max_completion_tokens") or body.get("max_tokens")
    return found if isinstance(found, int) else None


def error_inside(part: Any) -> str | None:
    """The words of an error inside an answer with status 200, with its code; None if there is none. Pure."""
    error = part.get("error") if isinstance(part, Mapping) else None
    if not error:
        return None
    if not isinstance(error, Mapping):
        return str(error)
    code, said = error.get("code"), error.get("message")
    details = error.get("metadata")
    more = f" {json.dumps(details, ensure_ascii=False)}" if details else ""
    return f"{said or json.dumps(dict(error))}{'' if code is None else f' (code {code})'}{more}"


def split_reasoning(text: str) -> tuple[str, str | None]:
    """(answer, reasoning or None); an answer that was cut while it reasoned is empty. Pure."""
    thought, end, answer = text.partition("</think>")
    if not end and not text.lstrip().startswith("<think>"):
        return text, None
    return answer.lstrip(), thought.strip().removeprefix("<think>")
