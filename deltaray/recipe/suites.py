"""Suites: the benchmarks of the papers as tasks with their settings, and what cannot be had by a name alone. Data.

Sources: [tulu] Tulu 3's settings, from memory and not checked against its code (papers.md 1.8 says so, too); [PDA]
2606.00357, section 4; [OLMo 3] 2512.13961, appendix A.8. What is not stated there is the harness's own.
"""

from dataclasses import dataclass, field

from deltaray.recipe.evaluation import Evaluation, Harness, HarnessTask, Task
from deltaray.recipe.models import Sampling


@dataclass(frozen=True)
class Suite:
    """A named list of tasks."""

    about: str
    harness: dict[str, HarnessTask] = field(default_factory=dict)
    local: dict[str, Task] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Benchmarks that the papers report and no task here can, each with the reason and the fix."""


_UNSAFE = "runs programs that the models write, with your rights: consent with `harness.unsafe_code: true`"
REACT = """\
Find the answer to the question. Take turns: think about what is still unknown inside <think> and </think>, ask for it \
inside <search> and </search>, and read what comes back inside <result> and </result>. As soon as nothing is unknown \
any more, write the answer, a few words at most, inside <answer> and </answer>.

Question: In which country is the birthplace of the composer of Finlandia?
<think>Finlandia is by Jean Sibelius. I need the place where he was born.</think>
<search>birthplace of Jean Sibelius</search>
<result>
(1) Jean Sibelius was born in Hämeenlinna, a town in the south of Finland.
</result>
<think>Hämeenlinna is in Finland.</think>
<answer>Finland</answer>

Question: {prompt}"""
"""One example, as in [PDA], whose words are not published."""


def _question(config: str, split: str) -> Task:
    return Task(
        path="RUC-NLPIR/FlashRAG_datasets",
        config=config,
        split=split,
        columns={"prompt": "question", "answer": "golden_answers"},
        template=REACT,
        metric="token_f1",
        search=True,
        sampling=Sampling(max_tokens=512),  # of a turn
    )


SUITES: dict[str, Suite] = {
    "delta-learning": Suite(
        "the eleven of 2507.06187, in Tulu 3's settings",
        harness={
            "mmlu": HarnessTask(task="mmlu_flan_cot_zeroshot"),  # 0-shot, with reasoning
            "math": HarnessTask(task="minerva_math", num_fewshot=4),
            "gsm8k": HarnessTask(task="gsm8k_cot", num_fewshot=8),
            "ifeval": HarnessTask(metric="prompt_level_loose_acc"),
            "bbh": HarnessTask(task="bbh_cot_fewshot", num_fewshot=3),
            "drop": HarnessTask(num_fewshot=3, metric="f1"),
            "truthfulqa": HarnessTask(task="truthfulqa_mc2"),  # its prompt holds six examples
            "humaneval": HarnessTask(  # pass@8 of 16, where Tulu 3 has pass@10: the harness has 2, 8, 16, 32 and 64
                task="humaneval_64_instruct",
                samples=16,
                metric="pass@8",
                generation={"do_sample": True, "temperature": 0.8, "top_p": 0.95},
            ),
            "humaneval_plus": HarnessTask(metric="pass@1"),  # greedy; the harness has no sampled one
        },
        local={
            "popqa": Task(  # token F1 without examples, where Tulu 3 has exact match with 15; the harness has none
                path="akariasai/PopQA",
                split="test",
                columns={"prompt": "question", "answer": "possible_answers"},
                metric="token_f1",
                sampling=Sampling(max_tokens=64),
            ),
        },
        missing={
            "alpaca_eval": (
                "AlpacaEval 2's length-controlled win rate needs its own judge, which is not a task of the harness; a "
                "task of your own with its 805 instructions and `{kind: judge, against: student}` gives a plain "
                "one"
            ),
        },
    ),
    "safety": Suite(
        "refusals, by a response's opening words and not by a judge; all of it is gated on the hub",
        local={
            "xstest": Task(
                path="walledai/XSTest",
                split="test",
                columns={"answer": "label"},
                answers={"unsafe": "refuse", "safe": "comply"},
                metric="refusal",
                sampling=Sampling(max_tokens=256),
            ),
            "harmbench": Task(
                path="walledai/HarmBench",
                config="standard",
                answer="refuse",
                metric="refusal",
                sampling=Sampling(max_tokens=256),
            ),
        },
        missing={
            "wildguardtest": (
                "some prompts of allenai/wildguardmix (wildguardtest) have no label: write the others into a file with "
                "`answer: refuse` (harmful) or `comply`, and a task with `metric: refusal`"
            ),
            "wildjailbreaktest": (
                "allenai/wildjailbreak (eval) is read with options of its own: write it into a file, "
                "adversarial_harmful as `answer: refuse`, adversarial_benign as `comply`, and a task with it"
            ),
            "do_anything_now": "its prompts are not on the hub: write a file, and a task with `answer: refuse`",
            "jailbreak_trigger": "TrustLLM's file is not on the hub: write a task with it and `answer: refuse`",
        },
    ),
    "knowledge-reasoning": Suite(
        "the four of 2606.00357, which does not say which GPQA nor how many shots; GPQA is gated on the hub",
        harness={
            "math": HarnessTask(task="minerva_math", num_fewshot=4),
            "gpqa": HarnessTask(task="gpqa_main_cot_zeroshot"),
            "mmlu": HarnessTask(task="mmlu_flan_cot_zeroshot"),
            "gsm8k": HarnessTask(task="gsm8k_cot", num_fewshot=8),
        },
    ),
    "agentic-search": Suite(
        "the seven of 2606.00357 in ReAct turns; there over e5-large-v2 and a Wikipedia of January 2020, here over "
        "`evaluation.search`",
        local={
            "nq": _question("nq", "test"),
            "triviaqa": _question("triviaqa", "test"),
            "popqa_search": _question("popqa", "test"),
            "hotpotqa": _question("hotpotqa", "dev"),
            "2wikimultihopqa": _question("2wikimultihopqa", "dev"),
            "bamboogle": _question("bamboogle", "test"),
            "musique": _question("musique", "dev"),
        },
    ),
}
UNSAFE = ("humaneval", "humaneval_plus")
"""Tasks of suites that are left out without consent."""


def expand_suites(evaluation: Evaluation) -> Evaluation:
    """The evaluation with the tasks of its suites written out; its own tasks come first, and win. Pure."""
    suites = [SUITES[name] for name in evaluation.suites if name in SUITES]
    if not suites:
        return evaluation
    given = evaluation.harness or Harness()
    harness, local = dict(given.tasks), dict(evaluation.tasks)
    for suite in suites:
        allowed = {name: it for name, it in suite.harness.items() if given.unsafe_code or name not in UNSAFE}
        harness |= {name: task for name, task in allowed.items() if name not in (harness.keys() | local.keys())}
        local |= {name: task for name, task in suite.local.items() if name not in (harness.keys() | local.keys())}
    return evaluation.model_copy(update={"tasks": local, "harness": given.model_copy(update={"tasks": harness})})


def suite_tasks() -> set[str]:
    """The harness's names of all tasks that suites use."""
    return {task.task or name for suite in SUITES.values() for name, task in suite.harness.items()}


def missing_in(evaluation: Evaluation | None) -> dict[str, str]:
    """Benchmarks of the evaluation's suites that are not evaluated, with the reason; those of the same name are."""
    if evaluation is None:
        return {}
    own = {*evaluation.tasks, *(evaluation.harness.tasks if evaluation.harness else {})}
    suites = [SUITES[name] for name in evaluation.suites]
    found = {name: why for suite in suites for name, why in suite.missing.items()}
    found |= {name: _UNSAFE for suite in suites for name in suite.harness if name in UNSAFE}
    return {name: why for name, why in found.items() if name not in own}
