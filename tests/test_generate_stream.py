"""Units through a pool of real vLLM engines: one module-wide run of two streams at once, read by many tests."""

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import character_model
import psutil
import pytest
from adapters import merge
from character_model import CHARACTERS, EOS, THINK, decode, encode, greedy_answers, make_adapter, make_model

from deltaray.generate import stream
from deltaray.generate.metrics import METRICS
from deltaray.generate.spec import EngineSpec
from deltaray.model_files.lora import lora_rank

ray = pytest.importorskip("ray")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vllm", allow_module_level=True)
for module in (sys.modules[__name__], character_model):  # Ray's workers cannot import a test's modules
    ray.cloudpickle.register_pickle_by_value(module)

LONGEST = 64  # max_model_len of the engines
PROMPTS = [f"{word} {n}+{n * 3}=" for n, word in enumerate(["add", "give the sum of", "what is", "and", "so", "now"])]
GREEDY = {"temperature": 0.0, "max_tokens": 12}
SAMPLED = {"temperature": 1.0, "max_tokens": 24, "seed": 7}
THINKING = SAMPLED | {"allowed_token_ids": [EOS, *encode("abc ")[1:], THINK + 1]}  # it often ends to think


def load(log: Path, unit: dict[str, Any]) -> dict[str, Any]:
    """Adds what the engine needs, and refuses empty prompts; leaves a mark for every call."""
    (log / f"{unit['unit_id']}.{os.getpid()}.{time.time_ns()}").touch()
    texts = unit["texts"]
    return unit | {
        "prompt_ids": texts,
        "messages": [[{"role": "user", "content": text}] for text in texts],
        "tools": [None for _ in texts],
        "token_ids": [encode(text) for text in texts],
        "refused": [None if text else "nothing in it" for text in texts],
    }


def write(folder: Path, unit: dict[str, Any]) -> dict[str, Any]:
    """The whole unit as one file, by rename; says how much it was."""
    path = folder / unit["destination"]
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(pickle.dumps(unit))
    temporary.replace(path)
    tokens = sum(output["tokens"] for outputs in unit["outputs"] for output in outputs)
    return {"unit_id": unit["unit_id"], "tokens": tokens}


def unit_of(name: str, model: str, settings: dict[str, Any], prompts: list[str], **more: Any) -> dict[str, Any]:
    """A unit whose prompts are their own ids."""
    unit = {"unit_id": name, "name": f"teacher-{name}", "model": model, "texts": prompts, "samples": [0]}
    fields = {"rows": list(range(len(prompts))), "sampling": json.dumps(settings), "destination": f"{name}.unit"}
    return {"adapter": None, "reasoning": None} | unit | fields | more


@dataclasses.dataclass
class Models:
    """Folders: two models, two adapters of the first, and these merged: into one adapter, into the model."""

    a: str
    b: str
    first: str
    second: str
    merged: str
    full: str


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    a, b = make_model(folder / "a", 1), make_model(folder / "b", 2)
    adapters = [Path(make_adapter(folder / "first", a, 1, 4)), Path(make_adapter(folder / "second", a, 2, 12))]
    merge(adapters, folder / "merged")
    merge(adapters, folder / "full", into_base=True)
    return Models(a, b, *map(str, adapters), str(folder / "merged"), str(folder / "full"))


@dataclasses.dataclass
class Run:
    """What two streams left: their summaries, the files they wrote and the marks of their load tasks."""

    summaries: dict[str, list[dict[str, Any]]]
    units: dict[str, dict[str, Any]]
    loads: list[str]

    def ids(self, name: str) -> list[list[list[int]]]:
        return [[output["token_ids"] for output in outputs] for outputs in self.units[name]["outputs"]]

    def one(self, name: str) -> list[list[int]]:
        return [ids for [ids] in self.ids(name)]


@pytest.fixture(scope="module")
def run(ray_session, models, tmp_path_factory):
    """Two streams in two threads. `fresh` runs only a, with and without adapters; `swap` starts with b, runs a, then
    b again, then the merged one (units are sorted by model), so each of its answers comes after a swap."""
    a, b = models.a, models.b
    log, out = tmp_path_factory.mktemp("log"), tmp_path_factory.mktemp("out")
    plain = EngineSpec(a, dtype="float32", max_model_len=LONGEST, gpus=0, cpus=1)
    rank = max(map(lora_rank, (models.first, models.second, models.merged)))
    specs = {
        "fresh": dataclasses.replace(plain, adapters=3, max_lora_rank=rank),
        "swap": dataclasses.replace(plain, model=b),
    }
    units = {
        "fresh": [
            unit_of("greedy-a", a, GREEDY, PROMPTS),
            unit_of("first", a, GREEDY, PROMPTS, adapter=models.first),
            unit_of("second", a, GREEDY, PROMPTS, adapter=models.second),
            unit_of("merged", a, GREEDY, PROMPTS, adapter=models.merged),
            unit_of("sampled-1", a, SAMPLED, PROMPTS, samples=[0, 1, 2]),
            unit_of("bad-rows", a, GREEDY, [PROMPTS[0], "x" * LONGEST, "", PROMPTS[1]]),
            unit_of("stop", a, GREEDY | {"stop": list(CHARACTERS[:20])}, PROMPTS),
            *[unit_of(f"many-{n}", a, SAMPLED, [f"{n}+{m}=" for m in range(20)]) for n in range(10)],
        ],
        "swap": [
            unit_of("swapped-b", b, GREEDY, PROMPTS),
            unit_of("swapped-a", a, GREEDY, PROMPTS),
            unit_of("full", models.full, GREEDY, PROMPTS),
            unit_of("sampled-2", a, SAMPLED, PROMPTS[::-1], samples=[1, 2]),
            unit_of("thinking", b, THINKING, PROMPTS, samples=list(range(8)), reasoning="deepseek_r1"),
        ],
    }

    def one(name: str) -> list[dict[str, Any]]:
        return list(stream.stream_units(units[name], specs[name], partial(load, log), partial(write, out)))

    with ThreadPoolExecutor(2) as threads:
        summaries = dict(zip(units, threads.map(one, units), strict=True))
    written = {path.stem: pickle.loads(path.read_bytes()) for path in out.glob("*.unit")}
    return Run(summaries, written, sorted(path.name.split(".")[0] for path in log.iterdir()))


@pytest.fixture(scope="module")
def expected(models):
    """The greedy answers of transformers: of all models and of a with each adapter."""
    which = {name: (getattr(models, name), None) for name in ("a", "b", "full")}
    which |= {name: (models.a, getattr(models, name)) for name in ("first", "second", "merged")}
    tokens = GREEDY["max_tokens"]
    answers = {name: greedy_answers(model, PROMPTS, tokens, adapter) for name, (model, adapter) in which.items()}
    assert len({json.dumps(answer) for answer in answers.values()}) == 5  # `merged` and `full` are the same
    return answers


def test_every_unit_is_run_and_written_exactly_once(run):
    finished = sorted(summary["unit_id"] for part in run.summaries.values() for summary in part)
    assert finished == sorted(run.units) == run.loads
    assert all(summary["tokens"] > 0 for part in run.summaries.values() for summary in part)


def test_a_unit_comes_back_whole(run):
    unit = run.units["sampled-1"]
    assert unit["prompt_ids"] == PROMPTS and unit["token_ids"] == [encode(prompt) for prompt in PROMPTS]
    assert [len(outputs) for outputs in unit["outputs"]] == [3] * len(PROMPTS)
    for output in (output for outputs in unit["outputs"] for output in outputs):
        assert output["text"] == decode(output["token_ids"])
        assert (output["tokens"], output["reasoning"]) == (len(output["token_ids"]), None)


def test_greedy_answers_are_those_of_transformers(run, expected):
    assert run.one("greedy-a") == expected["a"]


def test_swapped_weights_answer_like_a_fresh_engine_and_swap_back_exactly(run, expected):
    assert run.one("swapped-a") == run.one("greedy-a")
    assert run.one("swapped-b") == expected["b"]


@pytest.mark.parametrize("adapter", ["first", "second"])
def test_adapters_answer_like_peft_beside_each_other_and_their_base(run, expected, adapter):
    assert run.one(adapter) == expected[adapter]


def test_a_merged_adapter_answers_like_the_merged_weights_in_vllm_and_in_peft(run, expected):
    assert run.one("merged") == run.one("full") == expected["merged"] == expected["full"]


def test_finish_reasons(run):
    for outputs in run.units["sampled-1"]["outputs"]:
        for output in outputs:
            ended = output["token_ids"][-1] == EOS
            assert output["finish_reason"] == ("stop" if ended else "length")
            assert ended or output["tokens"] == SAMPLED["max_tokens"]
    reasons = [outputs[0]["finish_reason"] for outputs in run.units["stop"]["outputs"]]
    assert "stop" in reasons  # at a stop string


def test_a_bad_prompt_is_an_error_of_its_own_row_only(run):
    first, long, refused, last = (outputs[0] for outputs in run.units["bad-rows"]["outputs"])
    assert str(LONGEST) in long["error"] and "nothing in it" in refused["error"]
    for output in (long, refused):
        assert (output["finish_reason"], output["token_ids"], output["text"]) == ("error", [], "")
    assert [first["token_ids"], last["token_ids"]] == run.one("greedy-a")[:2]
    assert first["error"] is None


def test_sampling_repeats_sample_by_sample_in_another_engine(run):
    again = dict(zip(run.units["sampled-2"]["prompt_ids"], run.ids("sampled-2"), strict=True))
    assert [again[prompt] for prompt in PROMPTS] == [samples[1:] for samples in run.ids("sampled-1")]
    assert all(len({tuple(ids) for ids in samples}) == 3 for samples in run.ids("sampled-1"))


def test_reasoning_is_kept_apart_from_the_answer(run):
    outputs = [output for outputs in run.units["thinking"]["outputs"] for output in outputs]
    finished = 0
    for output in outputs:
        reasoning, mark, answer = decode(output["token_ids"]).partition("</think>")
        finished += bool(mark)
        if reasoning.strip():
            answer = answer.lstrip()
        assert (output["text"], output["reasoning"]) == (answer, reasoning.strip() or None)
    assert 0 < finished < len(outputs)  # both kinds did occur


def test_what_the_engines_did_stands_on_rays_metrics_page(run, ray_session):
    answers = {
        (unit["name"], reason): count
        for unit in run.units.values()
        for reason, count in Counter(
            output["finish_reason"] for outputs in unit["outputs"] for output in outputs if not _refused(output)
        ).items()
    }
    deadline = time.monotonic() + 60
    while (page := metrics_page(ray_session)) and time.monotonic() < deadline:
        if seen(page) == answers:
            break
        time.sleep(1)
    assert seen(page) == answers
    chance = {"deltaray_prefix_cache_hits"}  # the cache holds whole blocks only
    assert {name for name in METRICS if name in page} - chance == METRICS.keys() - chance - {"deltaray_preemptions"}
    tokens = sum(map(float, re.findall(r"^ray_deltaray_generation_tokens_total\{.*\} (\S+)$", page, re.M)))
    assert tokens == sum(summary["tokens"] for part in run.summaries.values() for summary in part)


def _refused(output: dict[str, Any]) -> bool:
    return (output["error"] or "").startswith("prompt refused")


def metrics_page(ray_session: Any) -> str:
    node = ray_session.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as response:
        return str(response.read().decode())


def seen(page: str) -> dict[tuple[str, str], int]:
    """Answers by teacher and reason, as Prometheus would read them; only those of this module's run."""
    found = re.findall(r'^ray_deltaray_answers_total\{.*name="(teacher-[^"]*)".*reason="(\w+)".*\} (\S+)$', page, re.M)
    return {(name, reason): int(float(count)) for name, reason, count in found}


def test_no_engine_outlives_its_stream(run):
    """Ray lets the actors go once the stream has ended; vLLM on CPU lives inside them and has no other process."""

    def engines() -> list[str]:
        children = psutil.Process().children(recursive=True)
        alive = psutil.process_iter(["pid", "cmdline"])  # leaves None where a process has just ended
        names = {child.info["pid"]: " ".join(child.info["cmdline"] or []) for child in alive}
        found = [names.get(child.pid, "") for child in children]
        return [name for name in found if "engine of" in name or "EngineCore" in name]

    deadline = time.monotonic() + 60
    while engines() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert engines() == []


def test_a_replica_gets_enough_units_to_stay_busy_but_not_all():
    units = [unit_of(str(n), "m", {}, [str(m) for m in range(100)]) for n in range(40)]
    spec = EngineSpec("m", engine_kwargs={"max_num_seqs": 256})
    assert stream.in_flight_of(units, spec, None) == 6
    assert stream.in_flight_of(units, dataclasses.replace(spec, max_replicas=10), None) == 4
    assert stream.in_flight_of(units[:1], spec, None) == 1
    assert stream.in_flight_of(units, spec, 3) == 3


def test_no_units_no_engine():
    assert list(stream.stream_units([], EngineSpec("m"), dict, dict)) == []
