"""Units through a pool of real vLLM engines: one module-wide run of two streams at once, read by many tests."""

import dataclasses
import importlib.util
import json
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from deltaray.generate import stream
from deltaray.generate.engine import check_same_model, request_seed
from deltaray.generate.spec import EngineSpec

ray = pytest.importorskip("ray")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vllm", allow_module_level=True)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test module

CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789+=."
BOS, EOS, FIRST = 1, 2, 3
LONGEST = 64  # max_model_len of the engines
PROMPTS = [f"{word} {n}+{n * 3}=" for n, word in enumerate(["add", "give the sum of", "what is", "and", "so", "now"])]
GREEDY = {"temperature": 0.0, "max_tokens": 12}
SAMPLED = {"temperature": 1.0, "max_tokens": 24, "seed": 7}


def encode(text: str) -> list[int]:
    return [BOS] + [FIRST + CHARACTERS.index(letter) for letter in text]


def make_model(path: Path, seed: int) -> str:
    """A random Llama with one token per character, made so that its greedy answers are unambiguous.

    Its output layer is tied to its embedding: the one kind of model that vLLM's weight reload gets wrong on CPU.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: n for n, token in enumerate(["<pad>", "<bos>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), head_dim=32, max_position_embeddings=256, **shape)
    config.update({"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0})
    config.update({"initializer_range": 0.3, "tie_word_embeddings": True})
    LlamaForCausalLM(config).float().save_pretrained(path)
    return str(path)


def load(log: Path, unit: dict[str, Any]) -> dict[str, Any]:
    """Adds token ids; leaves a mark for every call."""
    (log / f"{unit['unit_id']}.{os.getpid()}.{time.time_ns()}").touch()
    return unit | {"token_ids": [encode(prompt) for prompt in unit["prompt_ids"]]}


def write(folder: Path, unit: dict[str, Any]) -> dict[str, Any]:
    """The whole unit as one file, by rename; says which process wrote it and how much it was."""
    path = folder / unit["destination"]
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(pickle.dumps(unit))
    temporary.replace(path)
    tokens = sum(len(output["token_ids"]) for outputs in unit["outputs"] for output in outputs)
    return {"unit_id": unit["unit_id"], "tokens": tokens}


def unit_of(name: str, model: str, settings: dict[str, Any], prompts: list[str], samples: int = 1) -> dict[str, Any]:
    """A unit whose prompts are their own ids."""
    return {
        "unit_id": name,
        "model": model,
        "prompt_ids": prompts,
        "samples": samples,
        "sampling": json.dumps(settings),
        "destination": f"{name}.unit",
    }


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "a", 1), make_model(folder / "b", 2)


@dataclasses.dataclass
class Run:
    """What two streams left: their summaries, the files they wrote and the marks of their load tasks."""

    summaries: dict[str, list[dict[str, Any]]]
    units: dict[str, dict[str, Any]]
    loads: list[str]

    def ids(self, name: str) -> list[list[list[int]]]:
        return [[output["token_ids"] for output in outputs] for outputs in self.units[name]["outputs"]]


@pytest.fixture(scope="module")
def run(ray_session, two_models, tmp_path_factory):
    """Two streams in two threads. `fresh` starts with a and runs only a; `swap` starts with b, runs a, then b again
    (units are sorted by model), so each of its answers comes after a swap."""
    a, b = two_models
    log, out = tmp_path_factory.mktemp("log"), tmp_path_factory.mktemp("out")
    specs = {
        name: EngineSpec(model, dtype="float32", max_model_len=LONGEST, gpus=0, cpus=1)
        for name, model in (("fresh", a), ("swap", b))
    }
    units = {
        "fresh": [
            unit_of("greedy-a", a, GREEDY, PROMPTS),
            unit_of("sampled-1", a, SAMPLED, PROMPTS, samples=3),
            unit_of("too-long", a, GREEDY, [PROMPTS[0], "x" * LONGEST, PROMPTS[1]]),
            unit_of("stop", a, GREEDY | {"stop": list(CHARACTERS[:20])}, PROMPTS),
            *[unit_of(f"many-{n}", a, SAMPLED, [f"{n}+{m}=" for m in range(20)]) for n in range(10)],
        ],
        "swap": [
            unit_of("swapped-b", b, GREEDY, PROMPTS),
            unit_of("swapped-a", a, GREEDY, PROMPTS),
            unit_of("sampled-2", a, SAMPLED, PROMPTS[::-1], samples=3),
        ],
    }

    def one(name: str) -> list[dict[str, Any]]:
        return list(stream.stream_units(units[name], specs[name], partial(load, log), partial(write, out)))

    with ThreadPoolExecutor(2) as threads:
        summaries = dict(zip(units, threads.map(one, units), strict=True))
    written = {path.stem: pickle.loads(path.read_bytes()) for path in out.glob("*.unit")}
    return Run(summaries, written, sorted(path.name.split(".")[0] for path in log.iterdir()))


@pytest.fixture(scope="module")
def transformers_greedy(two_models):
    """The greedy answers of both models by transformers, end token included."""
    import torch
    from transformers import AutoModelForCausalLM

    answers = {}
    for name, path in zip("ab", two_models, strict=True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        settings = {"max_new_tokens": GREEDY["max_tokens"], "do_sample": False}
        prompts = [torch.tensor([encode(prompt)]) for prompt in PROMPTS]
        answers[name] = [[model.generate(ids, **settings)[0, ids.shape[1] :].tolist()] for ids in prompts]
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
        spoken = [token for token in output["token_ids"] if token >= FIRST]
        assert output["text"] == "".join(CHARACTERS[token - FIRST] for token in spoken)


def test_greedy_answers_are_those_of_transformers(run, transformers_greedy):
    assert run.ids("greedy-a") == transformers_greedy["a"]


def test_swapped_weights_answer_like_a_fresh_engine_and_swap_back_exactly(run, transformers_greedy):
    assert run.ids("swapped-a") == run.ids("greedy-a")
    assert run.ids("swapped-b") == transformers_greedy["b"] != transformers_greedy["a"]


def test_finish_reasons(run):
    for outputs in run.units["sampled-1"]["outputs"]:
        for output in outputs:
            ended = output["token_ids"][-1] == EOS
            assert output["finish_reason"] == ("stop" if ended else "length")
            assert ended or len(output["token_ids"]) == SAMPLED["max_tokens"]
    reasons = [outputs[0]["finish_reason"] for outputs in run.units["stop"]["outputs"]]
    assert "stop" in reasons  # at a stop string


def test_a_prompt_that_is_too_long_is_an_error_of_its_own_row_only(run):
    first, refused, last = (outputs[0] for outputs in run.units["too-long"]["outputs"])
    assert refused["finish_reason"] == "error" and str(LONGEST) in refused["error"]
    assert (refused["token_ids"], refused["text"]) == ([], "")
    assert [[first["token_ids"]], [last["token_ids"]]] == run.ids("greedy-a")[:2]
    assert first["error"] is None


def test_sampling_repeats_in_another_engine_and_differs_between_samples(run):
    again = dict(zip(run.units["sampled-2"]["prompt_ids"], run.ids("sampled-2"), strict=True))
    assert [again[prompt] for prompt in PROMPTS] == run.ids("sampled-1")
    assert all(len({tuple(ids) for ids in samples}) == 3 for samples in run.ids("sampled-1"))


def test_no_engine_outlives_its_stream(run):
    """Ray lets the actors go once the stream has ended; vLLM on CPU lives inside them and has no other process."""

    def engines() -> list[str]:
        children = psutil.Process().children(recursive=True)
        alive = psutil.process_iter(["pid", "cmdline"])  # leaves None where a process has just ended
        names = {child.info["pid"]: " ".join(child.info["cmdline"] or []) for child in alive}
        found = [names.get(child.pid, "") for child in children]
        return [name for name in found if "_PoolWorker" in name or "EngineCore" in name]

    deadline = time.monotonic() + 60
    while engines() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert engines() == []


def test_seeds_differ_by_answer_and_never_by_run():
    assert request_seed(0, "p", 0) == request_seed(0, "p", 0) == 3313353247608816784
    assert len({request_seed(*key) for key in [(0, "p", 0), (1, "p", 0), (0, "q", 0), (0, "p", 1)]}) == 4


def test_weights_of_another_shape_are_refused(two_models, tmp_path):
    a, b = two_models
    other = json.loads(Path(b, "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(other))
    check_same_model(EngineSpec(a), b)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        check_same_model(EngineSpec(a), str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"distributed_executor_backend": "uni"}),
        ({"gpus": 0.5}, {"gpu_memory_utilization": 0.45}),
        ({"gpus": 0.5, "engine_kwargs": {"gpu_memory_utilization": 0.3}}, {"gpu_memory_utilization": 0.3}),
        ({"gpus": 4, "tensor_parallel": 4}, {"distributed_executor_backend": "mp", "tensor_parallel_size": 4}),
        ({"gpus": 0}, {"enforce_eager": True}),
    ],
)
def test_engine_arguments(changes, expected):
    arguments = dataclasses.replace(EngineSpec("some/model"), **changes).arguments
    assert {key: arguments[key] for key in expected} == expected


def test_an_engine_over_several_nodes_leaves_its_gpus_to_vllm():
    kwargs = {"distributed_executor_backend": "ray"}
    spec = EngineSpec("some/model", gpus=16, tensor_parallel=8, pipeline_parallel=2, engine_kwargs=kwargs)
    assert stream._resources(spec)["num_gpus"] == 0
    assert spec.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_an_engine_gets_enough_units_to_stay_busy_but_not_all():
    units = [unit_of(str(n), "m", {}, [str(m) for m in range(100)]) for n in range(40)]
    spec = EngineSpec("m", engine_kwargs={"max_num_seqs": 256})
    assert stream._in_flight(units, spec, replicas=1) == 6
    assert stream._in_flight(units, spec, replicas=10) == 4
    assert stream._in_flight(units[:1], spec, replicas=1) == 1


def test_no_units_no_engine():
    assert list(stream.stream_units([], EngineSpec("m"), dict, dict)) == []
