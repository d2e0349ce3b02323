"""Texts that attack: templates, expressions and answers that want more time or memory than there is."""

import json
import multiprocessing
import os
import re
import signal
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from adapters import configure, make_adapter
from real_tokenizers import real_tokenizer
from test_tokenizer import CHATML, asks, made
from tiny_model import make_model
from transformers.utils.chat_template_utils import _compile_jinja_template

from deltaray.data.tokens import load_tokenizer
from deltaray.data.tokens.chat import render_prompts
from deltaray.data.tokens.check import check_tokenizer
from deltaray.data.tokens.templates import _overruns, render
from deltaray.errors import UserError
from deltaray.evaluate.harness_limits import limited_scoring
from deltaray.merge.adapter import Adapter
from deltaray.model_files.adapters import check_adapter
from deltaray.pair.filters import text_filter
from deltaray.recipe.filters import Keywords
from deltaray.recipe.models import Model, Student
from deltaray.recipe.scorers import IfEval
from deltaray.recipe.training import Lora
from deltaray.score.answers import boxed, fenced_blocks, final_letter, final_number
from deltaray.score.instructions import ifeval_scorer
from deltaray.score.judge import parse_rating, parse_verdict
from deltaray.score.response import Response, scored
from deltaray.score.surface import STATISTICS, is_repetitive
from deltaray.train.adapter import with_adapter
from deltaray.untrusted import Limited, OverLimitError, RaisedError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Is "3 < 4"? \u2028 Καλημέρα 👋'},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "  And 5?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Ädds", "parameters": {"type": "object"}}}]
HOSTILE = {
    "a power": "{{ 7**(7**(7**7)) }}",
    "a long text": "{{ ('ab' * 8**12)|length }}",
    "text that doubles": "{% set n = namespace(t='ab') %}{% for i in range(90) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "blocks that double": "{% set n = namespace(t='ab') %}{% for i in range(90) %}"
    "{% set t %}{{ n.t }}{{ n.t }}{% endset %}{% set n.t = t %}{% endfor %}",
    "lists that double": "{% set n = namespace(t=[1]) %}{% for i in range(90) %}{% set n.t = [n.t, n.t] %}{% endfor %}"
    "{{ n.t }}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m(n) %}{% if n %}{{ m(n-1) ~ m(n-1) }}{% endif %}{% endmacro %}{{ m(70) }}",
    "a wide field": "{{ '%s' % '{:>4000000000}'.format(1) }}",
    "a filter's width": "{{ 'a'|center(3000000000) }}",
    "an indent": "{{ messages|tojson(indent=2000000000) }}",
    "a method": "{{ 'a'.zfill(3000000000) }}",
    "much output": "{{ 'spam ' * 900000 }}",
}


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never ends is given up sooner than in a study."""
    monkeypatch.setattr("deltaray.data.tokens.templates.SECONDS", 0.3)
    monkeypatch.setattr("deltaray.data.tokens.templates.HURRIED", 0.3)
    monkeypatch.setattr("deltaray.pair.filters.SEARCH_SECONDS", 0.3)
    monkeypatch.setattr("deltaray.model_files.lora.MATCH_SECONDS", 0.3)
    monkeypatch.setattr("deltaray.train.adapter.MATCH_SECONDS", 0.3)
    monkeypatch.setattr("deltaray.score.instructions.SECONDS", 0.5)


# --- templates ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama3_1", "qwen3", "gemma3", "deepseek_v3", "command_r_plus"])
def test_honest_templates_are_rendered_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = real_tokenizer(name, tmp_path / "model")
    [template] = [json.loads(path.read_text())["chat_template"] for path in folder.glob("tokenizer_config.json")]
    named = [it["template"] for it in template] if isinstance(template, list) else [template]
    options = {"bos_token": "<s>", "eos_token": "</s>", "strftime_now": date(2026, 11, 28).strftime}
    for template in named:
        for chat in (CHAT, CHAT[1:], CHAT[3:]):
            for tools in (None, TOOLS):
                given = options | {"documents": None, "tools": tools, "add_generation_prompt": len(chat) == 1}
                try:
                    wanted = _compile_jinja_template(template).render(messages=chat, **given)
                except Exception as error:
                    with pytest.raises(RaisedError, match=re.escape(str(error))) as raised:
                        render([chat], chat_template=template, **given)
                    assert raised.type.__name__ == type(error).__name__
                else:
                    assert render([chat, chat], chat_template=template, **given) == ([wanted, wanted], [])


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_wants_too_much_is_refused(template: str) -> None:
    with pytest.raises(OverLimitError, match=r"more than [\d.,]+ (s of computing|MiB of memory|bytes)"):
        render([CHAT], chat_template=CHATML + template)


def test_plan_refuses_it_at_once(tmp_path: Path) -> None:
    template = "of a student: " + CHATML + HOSTILE["loops in loops"]
    folder = made(tmp_path / "model", template)
    said = r"^student: the chat template refuses turns of user: it takes more than 0.3 s of computing; correct it, or"
    with pytest.raises(UserError, match=said):
        check_tokenizer(Student(model=str(folder)), "student")
    assert _overruns[template] == 1


@pytest.mark.parametrize("where", ["jinja file", "tokenizer_config.json", "named", "recipe"])
def test_wherever_a_template_stands(where: str, tmp_path: Path) -> None:
    hostile = CHATML + HOSTILE["loops in loops"]
    folder = made(tmp_path / "model", {"default": hostile} if where == "named" else CHATML)
    settings: dict[str, Any] = {}
    if where == "jinja file":
        (folder / "chat_template.jinja").write_text(hostile)
    elif where == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink()
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": hostile}))
    elif where == "recipe":
        (tmp_path / "own.jinja").write_text(hostile)
        settings = {"chat_template": str(tmp_path / "own.jinja")}
    tokenizer = load_tokenizer(Model(model=str(folder), **settings), "x")
    with pytest.raises(OverLimitError, match="s of computing"):
        tokenizer.apply_chat_template(asks("hello"), tokenize=False)


def test_one_hostile_row_is_the_failure_of_that_row(tmp_path: Path) -> None:
    attack = "{% if 'quokkas' in messages[0].content %}" + HOSTILE["loops in loops"] + "{% endif %}"
    tokenizer = load_tokenizer(Model(model=str(made(tmp_path / "model", CHATML + attack))), "x")
    ids, refusals = render_prompts(tokenizer, [asks(text) for text in ("one", "about quokkas", "three")])
    assert ids[0] and ids[2] and not ids[1] and refusals[0] is refusals[2] is None
    assert "the chat template refuses it: OverLimitError: it takes more than 0.3 s of computing" in str(refusals[1])


def test_the_process_is_quiet_bare_and_ends_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-4471")
    beside = Limited("deltaray.untrusted.patterns", 1.0, 64)
    assert beside.call("found", "B+", "abbc") is True
    process = beside._process
    assert process is not None and b"planted" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    with pytest.raises(RaisedError, match="unterminated") as raised:
        beside.call("found", "(", "x")
    assert raised.type.__name__ == "error" and beside._process is process
    if (child := os.fork()) == 0:  # a forked process must not read our answers
        os._exit(not (beside._process is None and beside.call("found", "a", "a")))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert beside.call("found", "a", "b") is False
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_limits_hold_whatever_our_process_does_with_signals() -> None:
    """A worker may ignore or block what ends the process beside; and who is killed while idle is started again."""
    beside, kept = Limited("deltaray.untrusted.patterns", 0.3, 64), signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        with pytest.raises(OverLimitError, match=r"it takes more than 0\.3 s of computing"):
            beside.call("found", "(a+)+!", "a" * 64)
        assert beside.call("found", "a", "a") and beside._process is not None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        signal.signal(signal.SIGPROF, kept)
    beside._process.kill()
    os.waitid(os.P_PID, beside._process.pid, os.WEXITED | os.WNOWAIT)
    assert beside.call("found", "a", "a")


def test_a_module_that_cannot_be_imported_says_so() -> None:
    beside = Limited("deltaray.untrusted.nowhere", 1.0, 64)
    for _ in range(2):
        with pytest.raises(RaisedError, match=r"No module named 'deltaray\.untrusted\.nowhere'"):
            beside.call("f")


# --- regular expressions ------------------------------------------------------------------------------------------
SLOW = r"(([\w.])+)+#"


def test_an_adapters_expressions_cannot_hang_us_or_vllm(tmp_path: Path) -> None:
    folder, model = make_adapter(tmp_path / "adapter"), make_model()
    configure(folder, rank_pattern={r"layers\.\d+\.self_attn\.(q|v)_proj": 4}, alpha_pattern={"q_proj": 16})
    check_adapter(folder, "student.adapter", model, {})
    for key in ("rank_pattern", "alpha_pattern"):
        configure(folder, rank_pattern={}, alpha_pattern={})
        configure(folder, **{key: {SLOW: 4}})
        said = rf"adapter_config.json: {key}: cannot be matched .* it takes more than 0.3 s"
        with pytest.raises(UserError, match=said):
            Adapter(folder)
        with pytest.raises(UserError, match=f"^student.adapter: .*{said}"):
            check_adapter(folder, "student.adapter", model, {})


def test_targets_of_a_recipe_cannot_hang_peft() -> None:
    for targets, said in ((SLOW, "it takes more than 0.3 s"), ("(q_proj", "missing \\)")):
        with pytest.raises(UserError, match=f"^lora.targets: .* cannot be matched .*{said}"):
            with_adapter(make_model(), Lora(targets=targets))
    assert with_adapter(make_model(), Lora(targets=r".*\.(q|v)_proj"))


def test_what_keywords_cannot_search_in_time_does_not_stay() -> None:
    rule = text_filter(Keywords(kind="keywords", patterns=["(o+)+!", "never"]))
    pairs = [{"chosen": [{"content": text}], "rejected": [{"content": "x"}]} for text in ("fine", "NEVER", "o" * 64)]
    assert rule is not None and [rule(pair) for pair in pairs] == [True, False, False]
    assert ["refusal" in pair for pair in pairs] == [False, False, True]
    assert "its patterns cannot be searched for: it takes more than 0.3 s" in str(pairs[2]["refusal"])


def test_ifevals_checkers_have_limits() -> None:
    score = ifeval_scorer(IfEval(kind="ifeval"))
    asked = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["(e+)+!"]}]}
    slow = scored(score, Response("t", "e" * 64, json.dumps(asked)))
    assert slow.value is None and "scorer failed: OverLimitError: it takes more than 0.5 s" in str(slow.note)
    assert scored(score, Response("t", "eee!", json.dumps(asked))).value == 1


def test_a_harness_task_may_not_check_an_answer_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Task:
        kind = "generate_until"

        def get_config(self, name: str) -> str:
            return self.kind

        def process_results(self, document: dict[str, Any], results: list[str]) -> dict[str, Any]:
            if document["x"] == "wrong":
                raise KeyError("no such field")
            return {"exact": int(bool(results[0]) and eval(results[0]) == document["x"]), "spread": (1, results)}

    task, other = Task(), Task()
    other.kind = "multiple_choice"
    monkeypatch.setattr("deltaray.evaluate.harness_limits.SECONDS", 0.5)
    with limited_scoring([task, other]) as over:
        assert task.process_results({"x": 4}, ["2+2"]) == {"exact": 1, "spread": (1, ["2+2"])}
        assert task.process_results({"x": 5}, ["7**7**7**7**7"]) == {"exact": 0, "spread": (1, [""])}
        assert task.process_results({"x": 6}, ["len('ab' * 8**13)"]) == {"exact": 0, "spread": (1, [""])}
        assert task.process_results({"x": 7}, ["7"])["exact"] == 1
        with pytest.raises(RuntimeError, match="KeyError: 'no such field'"):
            task.process_results({"x": "wrong"}, ["7"])
    assert over == [{"x": 5}, {"x": 6}] and not multiprocessing.active_children()
    assert "process_results" not in vars(other)


# --- our own expressions ------------------------------------------------------------------------------------------
RUNS = [
    " ",
    "\t",
    "\n",
    "\u3000",
    " \n",
    "`",
    "```\n",
    "<think>",
    "*",
    "**a",
    "-",
    "|",
    ":",
    "#",
    "1",
    "1,",
    "(",
    "[",
    "a ",
]
READERS = {
    **STATISTICS,
    "repetitive": lambda text: is_repetitive(text, 10, 50),
    "numbers": final_number,
    "letters": final_letter,
    "fences": fenced_blocks,
    "boxed": boxed,
    "rating": parse_rating,
    "verdict": lambda text: parse_verdict(text, "first"),
}


@pytest.mark.parametrize("name", READERS)
def test_no_text_takes_long_to_read(name: str) -> None:
    """Linear readers take milliseconds; one that looks at every pair of characters never ends."""

    def give_up(*_: Any) -> None:
        pytest.fail(f"{name}: {before!r} and {run!r} again and again")

    kept = signal.signal(signal.SIGPROF, give_up)
    try:
        for run in RUNS:
            for before in ("", "answer", "**"):
                signal.setitimer(signal.ITIMER_PROF, 10)
                READERS[name](f"{before}{run * (80_000 // len(run))}x")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, kept)
