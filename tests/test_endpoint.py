"""The endpoint teacher against a real HTTP server that speaks chat completions and misbehaves on schedule."""

import asyncio
import json
import logging
import pickle
import random
import threading
import time
from typing import Any

import pytest
from completions_server import (
    KEY,
    TRICKLE,
    Reply,
    ask,
    completion,
    ok,
    prompt_of,
    refusal,
    serving,
    unit,
)

from deltaray.errors import StageError, UserError
from deltaray.generate import completions
from deltaray.generate.completions import output_of, retry_after, split_reasoning
from deltaray.generate.endpoint import EndpointSpec, Pace, check_endpoint
from deltaray.generate.finish import FINISH
from deltaray.recipe.models import Endpoint


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "FIRST_PAUSE", 0.005)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def echo(request: dict[str, Any], attempt: int) -> Reply:
    return completion(f"answer to {prompt_of(request)} #{request.get('seed')}")


def misbehaves(request: dict[str, Any], attempt: int) -> Reply | None:
    """By a seeded draw wrong in the first four attempts of a request; p13 is refused for good."""
    if prompt_of(request) == "p13":
        return refusal(400, "p13 is too long")
    draw = random.Random(f"{prompt_of(request)} {request['seed']} {attempt}").random()
    wrong: list[Reply | None] = [
        ok({"error": {"message": "slow down"}}, 429, **{"Retry-After": "0.01"}),
        ok({"error": {"message": "oops"}}, 500),
        (502, {"Content-Type": "text/html"}, b"<html>bad gateway</html>"),
        (200, {}, b'["half a'),
        (200, {"Content-Type": "text/plain"}, b"hello"),
        None,
    ]
    return echo(request, attempt) if attempt >= 4 or draw > 0.6 else wrong[int(draw * 10)]


def test_each_row_is_answered_once_by_a_server_that_misbehaves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    units = [unit(0, 12, (0, 1)), unit(12, 12, (3,)), unit(24, 6, (1, 2, 5))]
    with serving(misbehaves) as (server, url):
        outputs = ask(url, *units, in_flight=5, retries=20)
    answered = set()
    for asked, answers in zip(units, outputs, strict=True):
        assert [len(samples) for samples in answers] == [len(asked["samples"])] * len(asked["prompt_ids"])
        for name, samples in zip(asked["prompt_ids"], answers, strict=True):
            if name == "p13":
                assert {(o["finish_reason"], o["error"]) for o in samples} == {("error", "HTTP 400: p13 is too long")}
                continue
            assert all(o["text"].startswith(f"answer to {name} #") and o["error"] is None for o in samples)
            assert all(o["tokens"] == 7 and o["token_ids"] == [] for o in samples)
            answered |= {(name, o["text"].rpartition("#")[2]) for o in samples}
    assert len(answered) == 24 + 11 + 18  # every (prompt, sample) asked with a seed of its own
    assert {(name, str(seed)): n for (name, seed), n in server.served.items() if n} == dict.fromkeys(answered, 1)
    assert server.attempts.total() > 60  # it did misbehave
    assert server.most <= 5
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in caplog.text and KEY not in repr(outputs)


def test_as_many_requests_as_allowed_are_in_flight_over_all_units() -> None:
    together = threading.Barrier(4)

    def script(request: dict[str, Any], attempt: int) -> Reply:
        together.wait(timeout=20)  # answers nobody before four are here
        return echo(request, attempt)

    with serving(script) as (server, url):
        ask(url, unit(0, 6), unit(6, 2, (0, 1, 2)), in_flight=4, retries=0)
    assert server.most == 4
    assert len(server.requests) == 12


def test_requests_go_at_the_rate_that_the_recipe_allows_repeats_included() -> None:
    def script(request: dict[str, Any], attempt: int) -> Reply:
        return ok({}, 503) if attempt == 0 else echo(request, attempt)

    with serving(script) as (server, url):
        starts: list[float] = []
        ask(
            url,
            unit(0, 10),
            in_flight=8,
            requests_per_minute=3000,
            started=lambda: starts.append(time.monotonic()),
        )
    assert len(server.arrivals) == 20
    for number, arrival in enumerate(sorted(server.arrivals)):
        assert arrival - starts[0] >= number * 0.02 - 0.001


def test_a_request_waits_as_long_as_the_server_asks() -> None:
    told: list[float] = []

    def script(request: dict[str, Any], attempt: int) -> Reply:
        if told:
            return echo(request, attempt)
        told.append(time.monotonic())
        return ok({"error": {"message": "busy"}}, 429, **{"Retry-After": "0.5"})

    with serving(script) as (server, url):
        ask(url, unit(0, 3), in_flight=1)
    assert len(server.arrivals) == 4
    assert min(server.arrivals[1:]) >= told[0] + 0.5


def test_a_pause_holds_back_those_who_already_wait_for_their_turn() -> None:
    async def run() -> None:
        clock, pace = asyncio.get_running_loop().time, Pace(per_minute=600)

        async def go() -> float:
            await pace.turn()
            return clock()

        first = await go()
        waiting = [asyncio.create_task(go()) for _ in range(3)]
        await asyncio.sleep(0)  # they are in line now
        pace.hold(0.3)
        gone = sorted(await asyncio.gather(*waiting))
        assert all(time >= first + 0.299 + 0.1 * place for place, time in enumerate(gone))

    asyncio.run(run())


@pytest.mark.parametrize("trickles", [False, True])
def test_a_slow_answer_is_asked_for_again(trickles: bool) -> None:
    end = threading.Event()

    def script(request: dict[str, Any], attempt: int) -> Reply:
        reply = echo(request, attempt)
        if attempt > 0 or prompt_of(request) != "p1":
            return reply
        if trickles:
            return 200, {"X-Trickle": "yes"}, b" " * TRICKLE + reply[2]
        end.wait(20)
        return reply

    with serving(script) as (server, url):
        [outputs] = ask(url, unit(0, 3), timeout=1.0, retries=20)
        end.set()
    assert [o["text"].split("#")[0] for [o] in outputs] == [f"answer to p{n} " for n in range(3)]
    assert sum(n for (name, _), n in server.attempts.items() if name == "p1") >= 2


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (refusal(401, f"Incorrect API key provided: {KEY}"), "HTTP 401: Incorrect API key provided: [key]"),
        (refusal(403, "not for you"), "HTTP 403: not for you"),
        (refusal(404, "the model `the-model` does not exist"), "HTTP 404: the model `the-model` does not exist"),
        (refusal(429, "no money left", "insufficient_quota"), "HTTP 429: no money left"),
        (ok({"error": {"message": "tomorrow"}}, 429, **{"Retry-After": "80000"}), "HTTP 429: tomorrow"),
    ],
)
def test_a_server_that_refuses_everybody_ends_it(reply: Reply, words: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(lambda *_: reply) as (server, url), pytest.raises(StageError) as caught:
        ask(url, unit(0, 500), unit(500, 500), in_flight=4)
    assert words in str(caught.value) and url in str(caught.value) and "TEACHER_KEY" in str(caught.value)
    assert len(server.requests) <= 4  # those in flight when the first was refused, not a thousand
    assert KEY not in caplog.text + str(caught.value)


def test_a_403_of_one_prompt_fails_that_row_only() -> None:
    def script(request: dict[str, Any], attempt: int) -> Reply:
        return refusal(403, "flagged") if prompt_of(request) == "p2" else echo(request, attempt)

    with serving(script) as (_, url):
        [outputs] = ask(url, unit(0, 5), in_flight=1)
    assert [o["error"] for [o] in outputs] == [None, None, "HTTP 403: flagged", None, None]


def test_a_server_that_is_not_there_ends_it() -> None:
    with serving(echo) as (_, url):
        pass
    with pytest.raises(StageError, match="Connection error"):
        ask(url, unit(0, 2), retries=2)


def test_a_row_whose_retries_are_used_up_fails_with_the_words_of_the_server() -> None:
    def script(request: dict[str, Any], attempt: int) -> Reply:
        return refusal(500, "out of memory") if prompt_of(request) == "p1" else echo(request, attempt)

    with serving(script) as (server, url):
        [outputs] = ask(url, unit(0, 3), retries=3)
    assert [o["error"] for [o] in outputs] == [None, "HTTP 500: out of memory", None]
    assert sum(n for (name, _), n in server.attempts.items() if name == "p1") == 4


def test_seeds_are_those_of_the_prompt_and_the_sample_however_the_work_is_cut() -> None:
    def seeds(*units: Any) -> dict[tuple[str, str], int]:
        with serving(echo) as (server, url):
            outputs = ask(url, *units)
        assert len(server.requests) == 12
        return {
            (name, sample): int(output["text"].rpartition("#")[2])
            for asked, answers in zip(units, outputs, strict=True)
            for name, row in zip(asked["prompt_ids"], answers, strict=True)
            for sample, output in zip(asked["samples"], row, strict=True)
        }

    whole = seeds(unit(0, 4, (0, 1, 2)))
    assert whole == seeds(unit(0, 1, (0, 1, 2)), unit(1, 3, (0,)), unit(1, 3, (2, 1)))
    assert len(set(whole.values())) == 12
    assert whole != seeds(unit(0, 4, (0, 1, 2), seed=12))


def test_sampling_is_sent_in_openai_s_words() -> None:
    with serving(echo) as (server, url):
        ask(url, unit(0, 1), body={"max_tokens": None, "max_completion_tokens": 40, "metadata": {"a": "b"}})
        ask(url, unit(0, 1, temperature=0.0, top_k=5, stop=["END"]))
        ask(url, unit(0, 1, seed=None))
    first, greedy, unseeded = server.requests
    seed = first.pop("seed")
    assert 0 <= seed < 2**31
    assert first == {
        "model": "the-model",
        "messages": [{"role": "user", "content": "p0"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_completion_tokens": 40,
        "metadata": {"a": "b"},
    }
    assert greedy["top_k"] == 5 and greedy["stop"] == ["END"] and greedy["max_tokens"] == 40
    assert "seed" not in greedy and "seed" not in unseeded


def test_what_a_completion_becomes() -> None:
    replies = [
        completion("cut", "length"),
        completion(None),
        completion("\n\nfour", reasoning_content="two and two"),
        completion("five", reasoning="two and three"),
        completion("<think>two and four</think>\n\nsix"),
        completion("<think>two and f", "length"),
        completion("half \ud83d of a character"),
        completion("no", "content_filter"),
        completion(None, "tool_calls", tool_calls=[]),
    ]
    expected = [
        ("cut", None, "length", None),
        ("", None, "stop", None),
        ("four", "two and two", "stop", None),
        ("five", "two and three", "stop", None),
        ("six", "two and four", "stop", None),
        ("", "two and f", "length", None),
        ("half \ufffd of a character", None, "stop", None),
        ("", None, "error", "the server ended the answer: content_filter"),
        ("", None, "error", "the server ended the answer: tool_calls"),
    ]
    with serving(lambda request, _: replies[int(prompt_of(request)[1:])]) as (_, url):
        [outputs] = ask(url, unit(0, len(replies), reasoning="qwen3"))
        [[plain]] = ask(url, unit(4, 1))[0]
    fields = ("text", "reasoning", "finish_reason", "error")
    assert [tuple(output[field] for field in fields) for [output] in outputs] == expected
    assert plain["text"].startswith("<think>")  # a teacher without `reasoning` keeps its text


@pytest.mark.parametrize(
    ("word", "becomes"),
    [
        *(
            (word, "stop")
            for word in ("eos", "eos_token", "end_turn", "stop_sequence", "STOP", "COMPLETE", "completed")
        ),
        *(
            (word, "length")
            for word in ("max_tokens", "MAX_TOKENS", "model_length", "Length", "FINISH_REASON_MAX_TOKENS")
        ),
        *((word, "error") for word in ("SAFETY", "refusal", "content-filter", "tool_use", "abort", "OTHER")),
    ],
)
def test_the_words_of_other_servers_are_known(word: str, becomes: str) -> None:
    output = output_of(json.loads(completion("four", word)[2]), False)
    assert output["finish_reason"] == becomes
    assert output["text"] == ("" if becomes == "error" else "four")
    assert output["error"] == (f"the server ended the answer: {word}" if becomes == "error" else None)


def test_a_word_that_is_not_known_is_quoted() -> None:
    error = output_of(json.loads(completion("four", "zapped")[2]), False)["error"]
    assert "unknown" in error and "'zapped'" in error
    assert not {word for word in FINISH if word != word.casefold() or "-" in word or " " in word}


def test_without_a_word_the_number_of_tokens_tells_how_an_answer_ended() -> None:
    reply = json.loads(completion("four", None)[2])  # the server has counted 7 tokens
    assert output_of(reply, False, 8)["finish_reason"] == "stop"
    assert output_of(reply, False, 7)["finish_reason"] == "length"
    assert "no finish_reason" in output_of(reply, False)["error"]
    del reply["usage"], reply["choices"][0]["finish_reason"]
    assert "no finish_reason" in output_of(reply, False, 8)["error"]


def test_an_error_inside_a_good_answer_is_quoted_and_treated_by_its_code() -> None:
    inside = {"code": 502, "message": "the provider is away"}
    broken = {"choices": [{"finish_reason": "error", "message": {"content": ""}, "error": inside}]}
    assert output_of(broken, False)["error"] == "the server ended the answer: error: the provider is away (code 502)"

    def script(request: dict[str, Any], attempt: int) -> Reply:
        busy = [ok(broken), ok({"error": {"code": 429, "message": "slow down"}}), ok({"error": "who are you"})]
        name = prompt_of(request)
        if name == "p1":
            return busy[attempt] if attempt < len(busy) else echo(request, attempt)
        return (
            ok({"error": {"code": 400, "message": f"{name} is too long"}}) if name == "p2" else echo(request, attempt)
        )

    with serving(script) as (server, url):
        [outputs] = ask(url, unit(0, 4), retries=5)
    assert [output["error"] for [output] in outputs] == [None, None, "p2 is too long (code 400)", None]
    assert len(server.requests) == 4 + 3
    with serving(lambda *_: ok({"error": {"code": 401, "message": "no such key"}})) as (server, url):
        with pytest.raises(StageError, match="no such key"):
            ask(url, unit(0, 100), in_flight=2)
        assert len(server.requests) <= 2


def test_a_reply_that_nobody_would_expect_fails_its_row_alone() -> None:
    odd = {"choices": [{"finish_reason": {"type": "stop"}, "message": {"content": "four"}}]}
    refused = completion(None, refusal="I will not")
    replies = {"p1": ok(odd), "p2": completion(None, content=["four"]), "p3": refused}

    with serving(lambda request, attempt: replies.get(prompt_of(request)) or echo(request, attempt)) as (_, url):
        [outputs] = ask(url, unit(0, 5), retries=0)
    errors = [output["error"] for [output] in outputs]
    assert errors[0] is None and errors[4] is None and "unknown" in errors[1]
    assert errors[2] == "the server's answer is not one text" and errors[3] == "the server refused: I will not"


def test_reasoning_is_split_where_it_ends() -> None:
    assert split_reasoning("why</think> so") == ("so", "why")  # the template had opened it
    assert split_reasoning("no thought") == ("no thought", None)
    assert split_reasoning("<think>\n</think>\n\nso")[0] == "so"


def test_the_wait_is_read_from_seconds_or_a_date() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 600))
    assert 0 < retry_after({"retry-after": date}) <= 600
    wrong_clock = {"date": "Thu, 01 Jan 2026 00:00:30 GMT", "retry-after": "Thu, 01 Jan 2026 00:01:00 GMT"}
    assert retry_after(wrong_clock) == 30
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert {retry_after(h) for h in ({}, {"retry-after": "soon"}, {"retry-after": "-3"}, {"retry-after": "nan"})} == {0}


def test_no_key_of_the_environment_goes_to_a_server_that_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    with serving(echo) as (server, url):
        engine = EndpointSpec.of("the-model", Endpoint(url=url)).start()
        asyncio.run(engine.generate(unit(0, 1)))
    assert server.keys == {"Bearer EMPTY"}


def test_the_spec_holds_the_name_of_the_key_only() -> None:
    spec = EndpointSpec.of("m", Endpoint(url="https://host/v1", key_variable="TEACHER_KEY"))
    assert KEY.encode() not in pickle.dumps(spec) and KEY not in repr(spec)
    assert KEY not in str(spec.environment) + str(spec.ray_options)


@pytest.mark.parametrize(
    ("section", "secret", "words"),
    [
        ({"url": "host/v1"}, KEY, "teachers.t.endpoint.url: 'host/v1'"),
        ({"body": {"n": 2}}, KEY, "teachers.t.endpoint.body: n is set by deltaray"),
        ({}, None, "the environment variable TEACHER_KEY is not set"),
        ({}, " ", "the environment variable TEACHER_KEY is not set"),
        ({}, "two words", "TEACHER_KEY holds is not a key"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(
    section: dict[str, Any], secret: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    if secret is not None:
        monkeypatch.setenv("TEACHER_KEY", secret)
    endpoint = Endpoint(**{"url": "https://host/v1", "key_variable": "TEACHER_KEY"} | section)
    with pytest.raises(UserError) as caught:
        check_endpoint(endpoint, "teachers.t.endpoint")
    assert words in str(caught.value) and (not secret or not secret.strip() or secret not in str(caught.value))


def test_a_key_that_is_missing_on_a_node_is_named_there(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EndpointSpec.of("m", Endpoint(url="https://host/v1", key_variable="TEACHER_KEY"))
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(StageError, match="TEACHER_KEY is not set on the node"):
        spec.start()
