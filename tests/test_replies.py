"""Replies that attack: what they hold of the key, their shape, their size. One row fails, and nothing goes further."""

import asyncio
import base64
import gzip
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from completions_server import KEY, Reply, ask, completion, ok, prompt_of, refusal, serving, unit
from fuzz_replies import fuzz

from deltaray.data.prompts.rows import prompt_row
from deltaray.data.prompts.turns import RowError
from deltaray.errors import StageError, UserError
from deltaray.generate import completions
from deltaray.generate.completions import output_of, retry_after
from deltaray.generate.endpoint import EndpointSpec, check_endpoint
from deltaray.generate.search.engine import AnswerError, Searching
from deltaray.generate.search.retrievers import Server
from deltaray.recipe.models import Endpoint
from deltaray.recipe.search import Search
from deltaray.runtime import server as door
from deltaray.runtime.server import parsed
from deltaray.text import Cleaner


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "FIRST_PAUSE", 0.005)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def outputs_of(replies: list[Reply], **settings: Any) -> list[dict[str, Any]]:
    """What becomes of each reply as the answer of a row of its own; the row behind them is answered rightly."""

    def script(request: dict[str, Any], attempt: int) -> Reply:
        number = int(prompt_of(request)[1:])
        return replies[number] if number < len(replies) else completion("fine")

    with serving(script) as (_, url):
        [found] = ask(url, unit(0, len(replies) + 1, reasoning="qwen3"), retries=0, in_flight=1, **settings)
    [*outputs, last] = [output for [output] in found]
    assert last["text"] == "fine"
    return outputs


# --- the key ----------------------------------------------------------------------------------------------------
def test_the_key_is_in_nothing_that_a_server_says(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    form = base64.b64encode(f"Bearer {KEY}".encode()).decode()
    replies = [
        completion(f"my key is {KEY}, no, {form}", reasoning_content=f"<{KEY[::-1]}>"),
        completion("four", f"because_of_{KEY}"),
        completion(None, refusal=f"not for {KEY.upper()}"),
        completion("four", tool_calls=[{"function": {"name": KEY, "arguments": form}}]),
        (200, {"X-Key": KEY, "Content-Type": f"text/{KEY}"}, f"<p>{KEY}</p>".encode()),
        refusal(400, "".join(f"%{byte:02x}" for byte in KEY.encode())),
        ok({"detail": [{"input": {"headers": {"authorization": f"Bearer {KEY}"}}}]}, 422),
        (307, {"Location": f"http://127.0.0.1:9/{KEY}"}, b""),
        (500, {"Retry-After": KEY}, KEY.encode()),
    ]
    outputs = outputs_of([completion("first"), *replies])[1:]
    assert outputs[0]["text"].startswith("my key is [key], no, ") and outputs[0]["reasoning"] == "<[key]>"
    assert [output["error"] is None for output in outputs] == [True, *[False] * 8]
    assert "[key]" in outputs[1]["error"] and outputs[5]["error"] == "HTTP 400: [key]"
    assert not Cleaner([KEY]).holds(caplog.text + json.dumps(outputs))


def test_a_key_of_few_letters_is_taken_out_of_errors_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "unused")
    check_endpoint(Endpoint(url="https://host/v1", key_variable="TEACHER_KEY"), "teachers.t.endpoint")
    assert "too short to be told from words (6 characters of 8)" in caplog.text
    outputs = outputs_of([completion("an unused letter"), refusal(400, "no such key: unused")])
    assert outputs[0]["text"] == "an unused letter" and outputs[1]["error"] == "HTTP 400: no such key: [key]"


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "b\x07ell", "schlüssel"])
def test_what_is_no_key_is_not_quoted(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    endpoint = Endpoint(url="https://host/v1", key_variable="TEACHER_KEY")
    with pytest.raises(UserError, match="TEACHER_KEY holds is not a key") as caught:
        check_endpoint(endpoint, "teachers.t.endpoint")
    with pytest.raises(StageError, match="TEACHER_KEY holds is not a key") as there:
        EndpointSpec.of("m", endpoint).start()
    assert key not in str(caught.value) + str(there.value)


def test_neither_key_nor_prompt_follows_a_redirect() -> None:
    with serving(lambda *_: completion("four")) as (elsewhere, target):
        moved = (307, {"Location": f"{target}/chat/completions"}, b"")
        _, output = outputs_of([completion("first"), moved])
        assert "HTTP 307" in output["error"] and target in output["error"]
        with serving(lambda *_: moved) as (_, url), pytest.raises(StageError, match="the server sends on to"):
            ask(url, unit(0, 20), in_flight=1)
    assert not elsewhere.requests


def test_nothing_else_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "planted-organization")
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(str(self.headers))
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with running(Handler) as url, pytest.raises(StageError):
        ask(url, unit(0, 1))
    assert seen and "planted-organization" not in "".join(seen)


# --- shape ------------------------------------------------------------------------------------------------------
CHOICE: dict[str, Any] = {"finish_reason": "stop", "message": {"content": "four"}}


@pytest.mark.parametrize(
    "count", [-1, "7", "many", True, 7.5, float("inf"), 2**31, 10**400, [7], {"n": 7}], ids=lambda count: str(count)[:9]
)
def test_what_is_no_count_of_tokens_fails_the_row(count: Any) -> None:
    with pytest.raises(ValueError, match="not a number of tokens"):
        output_of({"choices": [CHOICE], "usage": {"completion_tokens": count}}, False)


@pytest.mark.parametrize("usage", [None, {}, {"completion_tokens": None}, {"completion_tokens": 7.0}])
def test_servers_that_count_nothing_or_in_floats_are_understood(usage: Any) -> None:
    assert output_of({"choices": [CHOICE], "usage": usage}, False)["tokens"] in (0, 7)


def test_odd_shapes_fail_their_rows_with_a_reason() -> None:
    calls = [{"a": 1}, "call", ["call"], [{"function": None}], 7, [[[]]]]
    odd: list[tuple[Reply, str]] = [
        (ok({"choices": []}), "no chat completion"),
        (ok({"choices": {"0": CHOICE}}), "no chat completion"),
        (ok({"choices": ["four"]}), "no chat completion"),
        (ok({"choices": [{**CHOICE, "message": "four"}]}), "no chat completion"),
        (ok({"choices": [CHOICE, CHOICE]}), "2 choices where one was asked for"),
        (ok([CHOICE]), "no chat completion"),
        (ok(None), "no chat completion"),
        ((200, {}, b'{"choices": ' + b"[" * 90_000 + b"]" * 90_000 + b"}"), "nested deeper than 100 levels"),
        ((200, {}, b'{"choices": ' + b"[" * 300 + b"]" * 300 + b"}"), "nested deeper than 100 levels"),
        ((200, {}, b'{"choices": [NaN]}'), "NaN is not a number of JSON"),
        ((200, {}, b'{"choices": [1e999]}'), "no chat completion"),
        ((200, {}, b'{"usage": ' + b"9" * 9000 + b"}"), "no JSON"),
        ((200, {}, b"\xff\xfe{"), "no JSON"),
        ((200, {}, b""), "no JSON"),
        ((200, {"Content-Type": "text/html"}, completion("four")[2]), "it is text/html"),
        ((200, {"Content-Encoding": "br"}, b"x"), "packed as 'br'"),
        ((200, {"Content-Encoding": "gzip"}, b"no gzip"), "broke off"),
        (completion("four", "stop\x1b[2J"), "stop\\x1b[2J"),
        (completion("x" * 11_000), "11,000 characters, more than 40 tokens can have"),
        *((completion("four", tool_calls=it), "a call of a tool") for it in calls),
    ]
    for output, (_, words) in zip(outputs_of([reply for reply, _ in odd]), odd, strict=True):
        assert output["finish_reason"] == "error" and words in output["error"] and output["text"] == "", output
        assert len(output["error"]) <= 1000 and output["error"].isprintable()


def test_an_answer_that_was_packed_unasked_is_read() -> None:
    packed = gzip.compress(completion("four")[2])
    [output] = outputs_of([(200, {"Content-Encoding": "gzip"}, packed)])
    assert output["text"] == "four"


@pytest.mark.parametrize("wait", ["1e999", "-1e999", "nan", "Mon, 99 Foo 99999999 99:99:99 GMT", "x" * 9000, ""])
def test_no_pause_that_a_server_asks_for_can_break_anything(wait: str) -> None:
    assert retry_after({"retry-after": wait, "date": wait}) >= 0


# --- size and time ----------------------------------------------------------------------------------------------
@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def endless(sent: list[int], status: int = 200) -> type[BaseHTTPRequestHandler]:
    """A server that never ends its reply."""

    class Endless(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            piece = b'10000\r\n"' + b"x" * 0xFFFE + b'"\r\n'
            try:
                while len(sent) < 4000:
                    self.wfile.write(piece)
                    sent.append(len(piece))
            except OSError:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    return Endless


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_without_end_is_not_read_to_its_end(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MOST_BYTES", 1 << 20)
    sent: list[int] = []
    with running(endless(sent, status)) as url:
        [[[output]]] = ask(url, unit(0, 1), retries=0)
    assert ("larger than 1 MiB" if status == 200 else 'HTTP 500: "xxxx') in output["error"]
    assert sum(sent) < 64 << 20  # what was under way, not 256 MiB


def test_a_packed_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(b" " * (64 << 20) + completion("four")[2])
    [output] = outputs_of([(200, {"Content-Encoding": "gzip"}, bomb)])
    assert output["error"] == "the answer is larger than 8 MiB"


# --- servers that search ----------------------------------------------------------------------------------------
class Searched(BaseHTTPRequestHandler):
    """Finds a passage for every query, and nonsense for a hostile one."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = {"result": [[{"contents": f"on {query} \ud83d"}] * 9 for query in asked["queries"]]}
        body = json.dumps({"result": None} if "hostile" in asked["queries"] else good).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_nonsense_from_a_search_fails_that_row_alone() -> None:
    async def find(url: str) -> list[Any]:
        searching = Searching(None, Search(url=url, passages=2), Server(url, pause=0.0))  # type: ignore[arg-type]
        return await searching._found(["one", "hostile", "two"])

    with running(Searched) as url:
        first, second, third = asyncio.run(find(url))
    assert first == ["on one \ufffd"] * 2 and third == ["on two \ufffd"] * 2
    assert isinstance(second, AnswerError) and "no `result`" in str(second)


def test_what_is_parsed_is_json_alone() -> None:
    assert parsed(b'\xef\xbb\xbf{"a": [1, null, "\\ud800"]}') == {"a": [1, None, "\ud800"]}
    for raw in (b"Infinity", b"-Infinity", b"[1,]", b"{", b"\x80", b"[" * 101 + b"1" + b"]" * 101):
        with pytest.raises(ValueError):
            parsed(raw)


def test_replies_made_wrong_at_random_are_answers_or_failed_rows() -> None:
    found = fuzz(200, seed=5)
    assert found["failed"] > 40 and found["answer"] > 15 and found["slowest_seconds"] < 5


# --- rows from outside ------------------------------------------------------------------------------------------
DEEP: dict[str, Any] = {"x": 1}
for _ in range(3000):
    DEEP = {"x": DEEP}


@pytest.mark.parametrize(
    "calls",
    ["f()", 7, True, {"name": "f"}, ["f"], [None], [[]], [{"function": "f"}], [{"name": 7}], [{"arguments": DEEP}]],
    ids=range(10),
)
def test_calls_of_any_form_in_a_row_are_refused_with_the_reason(calls: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": calls}]
    with pytest.raises(RowError, match=r"must be a list of calls|nested deeper than 100 levels"):
        prompt_row({"messages": [*turns, {"role": "user", "content": "c"}]})


@pytest.mark.parametrize("calls", [None, [], [{"name": "f"}], [{"function": {"name": "f", "arguments": "{}"}}]])
def test_calls_as_they_should_be_are_taken(calls: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": calls}]
    assert prompt_row({"messages": [*turns, {"role": "user", "content": "c"}]})["error"] is None
