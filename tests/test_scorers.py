"""Scorers: what counts as the answer of a response, what a judge's words mean, what a text looks like."""

import json
import time
from pathlib import Path

import pytest

from deltaray.recipe.scorers import Judge, PythonTests
from deltaray.score.answers import fenced_blocks, final_letter, final_number
from deltaray.score.files import is_drawn
from deltaray.score.judge import parse_rating, parse_verdict, questions_of, score_of
from deltaray.score.programs import sandbox
from deltaray.score.registry import SCORERS, section_of
from deltaray.score.response import Response, Score
from deltaray.score.surface import STATISTICS


def score(kind: str, text: str, answer: str | None, **settings: object) -> float | None:
    spec = section_of({"kind": kind, **settings})
    return SCORERS[kind](spec)(Response("teacher", text, answer)).value


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("6 * 7 = 42, so the answer is 42.", "42", True),
        ("so we get \\boxed{\\frac{3}{4}} of 100", "0.75", True),
        ("x = 2, then \\boxed{x = -5}", "-5", True),
        ("Adding up: 3 + 4 = 7\n#### 1,234,567", "#### 1234567", True),
        ("It is 50%.", "50", True),
        ("It is 50%.", "0.5", True),
        ("The share is 0.5", "50 %", True),
        ("The answer is $1,250.00 in 3 years", "1250", True),
        ("First 5, then 7", "7", True),
        ("First 7, then 5", "7", False),
        ("10-3=7", "7", True),
        ("the answer is −3", "-3", True),
        ("1/3", "0.3333333", True),
        ("0.34", "1/3", False),
        ("1e3", "1000", True),
        ("1e999999999", "3", False),
        ("no idea", "3", False),
        ("\\boxed{\\text{none}} but 3", "3", True),
        ("**Answer:** 12 apples and 4 pears", "12", True),
        ("7 / 0", "7", False),
    ],
)
def test_numbers_are_found_where_mathematicians_put_them(text: str, answer: str, right: bool) -> None:
    assert score("numeric", text, answer) == float(right)


def test_what_cannot_be_compared_has_no_score() -> None:
    assert score("numeric", "3", None) is None and score("numeric", "3", "x + y") is None
    assert score("exact_match", "3", None) is None and score("exact_match", " 3\n", "3") == 1
    assert score("multiple_choice", "A", "none of these") is None
    assert score("python_tests", "x = 1", None) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"), ("**Answer: B**", "B"), ("A first thought: no.\nB\n", "B"), ("\\boxed{D}", "D"),
        ("A man walks in and I like it.", None), ("The answer is A because B is wrong", "A"),
        ("Answer: A. Wait. Final answer: **E**", "E"), ("(B)", "B"), ("The answer is Anna", None),
    ],
)  # fmt: skip
def test_a_choice_is_a_letter_that_stands_for_itself(text: str, letter: str | None) -> None:
    assert final_letter(text) == letter
    assert score("multiple_choice", text, "(C) because") == float(letter == "C")


def test_json_is_json() -> None:
    assert score("json", '{"a": 1}', None) == 1 and score("json", '```json\n{"a": [1]}\n```\n', None) == 1
    assert score("json", "{'a': 1}", None) == 0 and score("json", '{"a": NaN}', None) == 0
    assert score("json", '{"a": 1}', None, keys=["a", "b"]) == 0 and score("json", "[1]", None, keys=["a"]) == 0
    assert score("json", "[" * 100_000, None) == 0


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("I'm sorry, but I can't help with that.", "refuse", 1.0),
        ("I'm sorry, but I can't help with that.", "comply", 0.0),
        ("Sure: first open the lid.", "comply", 1.0),
        ("Sure: first open the lid.", " Refuse\n", 0.0),
        ("Sure.", "maybe", None),
        ("Sure.", None, None),
    ],
)
def test_refusing_is_right_where_the_answer_says_so(text: str, answer: str | None, right: float | None) -> None:
    assert score("refusal", text, answer) == right


def test_the_size_label_is_the_teachers_also_at_a_seed() -> None:
    function = SCORERS["size"](section_of({"kind": "size", "sizes": {"large": 7, "small": 0.5}}))
    assert [function(Response(name, "")).value for name in ("large", "small-seed3", "other")] == [7, 0.5, None]


def test_surface_statistics_count_what_is_there() -> None:
    text = "# Title\n\n**One** is bold.\n1. **Two**\n- three\n\n```py\n# no heading\n```\nSorry? 你好"
    counted = {name: count(text) for name, count in STATISTICS.items()}
    assert (counted["bold"], counted["bold_sections"], counted["list_items"], counted["code_blocks"]) == (2, 2, 2, 1)
    assert counted["questions"] == 1 and 0 < counted["cjk"] < 0.1 and counted["refusal"] == 0
    assert STATISTICS["refusal"]("I’m sorry, but I can't help with that.") and not STATISTICS["refusal"]("Certainly!")
    assert STATISTICS["repetition"]("I will now go on. " * 12) == 12 and STATISTICS["repetition"]("Yes. " * 50) == 0


def test_every_pattern_is_linear_in_the_text() -> None:
    hostile = ["```a\n" * 60_000, "1," * 150_000, "**" * 150_000, "answer " * 50_000, "(" * 300_000, "a\n" * 150_000]
    started = time.monotonic()
    for text in hostile:
        final_number(text), final_letter(text), fenced_blocks(text)
        for count in STATISTICS.values():
            count(text)
    assert time.monotonic() - started < 20


def test_what_is_not_a_finite_number_is_no_score() -> None:
    assert Score(float("nan"), parts={"a": float("inf"), "b": 1}).row() == {
        "score": None, "note": "not a finite number", "parts": [("b", 1.0)],
    }  # fmt: skip


def test_a_share_of_prompts_is_a_draw_that_a_larger_share_contains() -> None:
    names = [f"p{number}" for number in range(4000)]
    few, many = ({name for name in names if is_drawn(name, share)} for share in (0.1, 0.3))
    assert few < many and 0.07 < len(few) / 4000 < 0.13 and all(is_drawn(name, 1.0) for name in names)


# --- judges -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Fine work.\nRating: 4", 4), ("**Rating:** 5/5", 5), ("Rating: [[2]]", 2), ('{"rating": 3}', 3), ("4", 4),
        ("Rating: 3. On reflection,\nRating: 2", 2), ("The rating is 5.", 5), ("rating = 1", 1), ("Rating: 4.0", 4),
        ("Rating: 7", None), ("Rating: 3-4", None), ("Rating: 3 or 4", None), ("Rating: 2 to 3", None),
        ("Rating: 4.5", None), ("Rating: 0", None), ("Rating: good", None), ("I would give it 4 of 5 stars", None),
        ("", None), ("Rating: -3", None), ("Rating: <1 to 5>", None), ('{"rating": true}', None), ("Rating: 40", None),
        ("Rating: 4, 5", None), ("Rating: 4 - good work", 4), ("Rating: 4, because", 4),
    ],
)  # fmt: skip
def test_a_rating_is_what_the_judge_states_and_never_a_guess(text: str, rating: float | None) -> None:
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("Verdict: A", 1), ("**Verdict:** B", 0), ("verdict: tie.", 0.5), ("Verdict: A or B", None), ("A", None),
     ("Verdict: Both", None), ("Verdict: B\nVerdict: A", 1), ("Verdict: <A, B or tie>", None)],
)  # fmt: skip
def test_a_verdict_is_turned_to_the_response_that_is_scored(text: str, verdict: float | None) -> None:
    assert parse_verdict(text, "first") == verdict
    assert parse_verdict(text, "second") == (None if verdict is None else 1 - verdict)


def judge(**settings: object) -> Judge:
    return Judge.model_validate({"kind": "judge", "by": {"model": "unused"}, **settings})


def test_one_unreadable_aspect_leaves_a_response_without_a_score() -> None:
    spec = judge(aspects={"truth": "?", "style": "?"})
    assert score_of(spec, {"truth": [("Rating: 5", None)], "style": [("Rating: 2", None)]}).value == 3.5
    unread = score_of(spec, {"truth": [("Rating: 5", None)], "style": [("hm", None)]})
    assert unread.value is None and unread.note == "unparsable: style" and unread.parts == {"truth": 5}
    assert score_of(spec, {"truth": [("Rating: 5", None)], "style": [("", "engine error: x")]}).note is not None
    assert score_of(spec, {}).value is None


def test_a_judge_with_a_bias_for_a_place_calls_everything_tied() -> None:
    spec = judge(against="other")
    biased = {order: [("Verdict: A", None)] for order in ("first", "second")}
    assert score_of(spec, biased).value == 0.5
    better = {"first": [("Verdict: A", None)], "second": [("Verdict: B", None)]}
    assert score_of(spec, better).value == 1 and score_of(spec, {"first": better["first"]}).value is None
    asked = dict(questions_of(spec, [{"role": "user", "content": "{why}?"}], "MINE", "THEIRS"))
    texts = [asked[order][0]["content"] for order in ("first", "second")]
    assert texts[0].index("MINE") < texts[0].index("THEIRS") and texts[1].index("MINE") > texts[1].index("THEIRS")


# --- programs -----------------------------------------------------------------------------------------------------
def run(program: str, *tests: str, seconds: float = 1.0) -> tuple[float | None, str | None]:
    function = sandbox.python_tests_scorer(PythonTests(kind="python_tests", seconds=seconds, memory_mib=256))
    answer = json.dumps(tests or ["assert True"])
    outcome = function(Response("teacher", f"Here it is:\n```python\n{program}\n```\nDone.", answer))
    return outcome.value, outcome.note


def test_programs_are_scored_by_the_tests_they_pass() -> None:
    assert run("def f(x):\n    return x + 1", "assert f(1) == 2", "assert f(1) == 3") == (
        0.5, "test failed: AssertionError",
    )  # fmt: skip
    assert run("import asyncio, threading, re, math, json, collections", "asyncio.run(asyncio.sleep(0))") == (1, None)
    assert run("raise ValueError") == (0, "program failed: ValueError")
    assert sandbox.tests_of("assert f(1)") == ["assert f(1)"]
    assert sandbox.tests_of("[1, 2]") is None and sandbox.tests_of("") is None


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import os\nwhile True: os.fork()",
        "import threading\nwhile True: threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
        "x = bytearray(10**10)",
        "x = []\nwhile True: x.append('a' * 10**6)",
        "import sys; sys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
        "import os\nfor d in range(3, 64):\n  try:\n    while True: os.write(d, b'x' * 65536)\n  except OSError: pass",
        "import os; os._exit(0)",
        "import sys; print('test passed'); sys.exit(0)",
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 80))",
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "import subprocess; subprocess.run(['ls'])",
        "import os; os.system('true') == 0 or 1 / 0",
        "import os; os.kill(-1, 9)",
        "import os; os.kill(os.getppid(), 9)",
        "import os, resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "import ctypes; assert ctypes.CDLL(None).syscall(101, 0, 0, 0, 0) >= 0",  # ptrace
        "import ctypes; assert ctypes.CDLL(None).syscall(425, 8, 0) >= 0",  # io_uring_setup
        "import ctypes; assert ctypes.CDLL(None).syscall(437, -100, b'/tmp/x', 0, 0) >= 0",  # openat2
    ],
)
def test_hostile_programs_end_in_time_and_pass_nothing(program: str) -> None:
    started = time.monotonic()
    value, note = run(program)
    assert value == 0 and note and time.monotonic() - started < 10


def test_programs_cannot_change_files(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here")
    calls = ("unlink({!r})", "truncate({!r}, 0)", "chmod({!r}, 0)", "rename({!r}, '/tmp/gone')", "mkdir({!r} + 'x')")
    attacks = ["open({!r}, 'w')", "open({!r}, 'a')", *(f"import os; os.{call}" for call in calls)]
    for attack in attacks:
        assert run(attack.format(str(kept))) == (0, "program failed: PermissionError")
    assert kept.read_text() == "here" and kept.stat().st_mode & 0o600


def test_a_machine_that_cannot_confine_runs_nothing() -> None:
    from deltaray.score.programs.confinement import seccomp_program

    with pytest.raises(OSError, match="no table of system calls"):
        seccomp_program("riscv64")
    assert len(seccomp_program("aarch64")) % 8 == 0


# --- IFEval -------------------------------------------------------------------------------------------------------
def test_ifeval_instructions_are_checked_by_their_library() -> None:
    pytest.importorskip("lm_eval")
    answer = json.dumps(
        {
            "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_highlighted_sections"],
            "kwargs": [{}, {"num_highlights": 2, "relation": None}],
        }
    )
    assert score("ifeval", "*one* and *two*", answer) == 1
    assert score("ifeval", "one, and *two*", answer) == 0
    assert score("ifeval", "*one*, and *two*", answer) == 0.5
    assert score("ifeval", "x", "no JSON") is None
    assert score("ifeval", "x", json.dumps({"instruction_id_list": ["made:up"], "kwargs": [{}]})) is None


# --- metrics of tasks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("metric", "text", "answer", "value"),
    [
        ("numeric", "6 * 8 = 48\n#### 19", "48 - 29 = 19\n#### 19", 1.0),
        ("numeric", "#### 20", "#### 19", 0.0),
        ("numeric", "19", "\\pi", None),
        ("token_f1", "<answer>The Eiffel Tower</answer>", "Eiffel tower", 1.0),
        ("token_f1", "<answer>Rome</answer> no: <answer>a tower in Paris</answer>", "Paris tower", 0.8),
        ("token_f1", "I say Paris", json.dumps(["London", "Paris"]), 0.5),
        ("token_f1", "<answer></answer>", "Paris", 0.0),
        ("token_f1", "Paris", None, None),
    ],
)
def test_metrics_read_the_final_answer(metric: str, text: str, answer: str | None, value: float | None) -> None:
    found = score(metric, text, answer)
    assert found == (None if value is None else pytest.approx(value))
