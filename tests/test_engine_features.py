"""What makes an engine, worked out without one: arguments, adapters, reasoning, what it asks of Ray."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from character_model import encode, make_model, make_tokenizer

from deltaray.errors import UserError
from deltaray.generate.metrics import EngineMetrics, short_name
from deltaray.generate.requests import request_seed
from deltaray.generate.spec import EngineSpec
from deltaray.generate.weights import check_same_model
from deltaray.model_files.lora import lora_rank

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
SPEC = EngineSpec("some/model")
LORA = {"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 24}, "bias": "none", "modules_to_save": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"distributed_executor_backend": "uni", "enable_lora": None}),
        ({"gpus": 0.5}, {"gpu_memory_utilization": 0.45}),
        ({"gpus": 0.5, "engine_kwargs": {"gpu_memory_utilization": 0.3}}, {"gpu_memory_utilization": 0.3}),
        ({"gpus": 4, "tensor_parallel": 4}, {"distributed_executor_backend": "mp", "tensor_parallel_size": 4}),
        ({"gpus": 0}, {"enforce_eager": True}),
        ({"gpus": 0, "pipeline_parallel": 2}, {"enforce_eager": False}),
        ({"adapters": 1, "max_lora_rank": 3}, {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}),
        ({"adapters": 20, "max_lora_rank": 257}, {"max_lora_rank": 320, "max_loras": 8, "max_cpu_loras": 21}),
        ({"gpus": 0, "adapters": 2, "max_lora_rank": 8}, {"max_loras": 3, "max_cpu_loras": 3}),
    ],
)
def test_engine_arguments(changes, expected):
    arguments = dataclasses.replace(SPEC, **changes).arguments
    assert {key: arguments.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    "changes",
    [{"tensor_parallel": 0}, {"max_replicas": 0}, {"gpus": -1}, {"adapters": 1}, {"adapters": 1, "max_lora_rank": 513}],
)
def test_no_engine_could_have_these(changes):
    with pytest.raises(ValueError, match=r"at least|is 1 to"):
        dataclasses.replace(SPEC, **changes)


def test_what_a_replica_asks_of_ray():
    assert dataclasses.replace(SPEC, gpus=0.25).ray_options == {"num_gpus": 0.25}
    assert dataclasses.replace(SPEC, accelerator="L4").ray_options == {"num_gpus": 1.0, "accelerator_type": "L4"}


def test_an_engine_over_several_nodes_leaves_its_gpus_to_vllm():
    kwargs = {"distributed_executor_backend": "ray"}
    spec = dataclasses.replace(SPEC, gpus=16, tensor_parallel=8, pipeline_parallel=2, engine_kwargs=kwargs)
    assert spec.ray_options["num_gpus"] == 0
    assert spec.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@needs_vllm
@pytest.mark.parametrize("world", [1, 2])
def test_requests_in_flight_are_vllms_own_default(world):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    _, sequences = EngineArgs.get_batch_defaults(world)
    spec = dataclasses.replace(SPEC, gpus=0, tensor_parallel=world)
    assert spec.requests_in_flight == sequences[UsageContext.LLM_CLASS]
    assert dataclasses.replace(spec, engine_kwargs={"max_num_seqs": 7}).requests_in_flight == 7


def adapter(folder: Path, config: dict | None, weights: bool = True) -> str:
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        (folder / "adapter_model.safetensors").touch()
    return str(folder)


def test_an_adapters_rank_is_its_largest(tmp_path):
    assert lora_rank(adapter(tmp_path, LORA)) == 24


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        (None, True, "no PEFT LoRA adapter"),
        ({"peft_type": "LORA"}, True, "no PEFT LoRA adapter"),
        ([], True, "no PEFT LoRA adapter"),
        (LORA | {"peft_type": "LOHA"}, True, "not LOHA"),
        (LORA | {"use_dora": True}, True, "DoRA"),
        (LORA | {"modules_to_save": ["lm_head"]}, True, "modules_to_save"),
        (LORA | {"r": 1024}, True, "up to 512"),
        (LORA, False, "adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused_by_its_folder(tmp_path, config, weights, words):
    with pytest.raises(UserError, match=words) as refused:
        lora_rank(adapter(tmp_path, config, weights))
    assert str(tmp_path) in str(refused.value)


THINK_OFF = "q<think></think>"
CASES = [
    ("<think>\nab\n</think>\n\nc d", "q", ("c d", "ab")),
    ("ab\n</think>\n\nc d", "q<think>", ("c d", "ab")),  # the template began the thinking
    ("<think>ab", "q", ("", "ab")),  # cut while it thought
    ("ab", "q<think>", ("", "ab")),
    ("</think>c", "q<think>", ("c", None)),
    (" c", THINK_OFF, (" c", None)),
    ("", "q", ("", None)),
]


@needs_vllm
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "deepseek_v3", "glm45", "step3"])
def test_reasoning_is_told_from_the_answer(name, special):
    from deltaray.generate.reasoning import Splitter

    splitter = Splitter(name, make_tokenizer(special))
    for text, prompt, expected in CASES:
        marks = [part for part in prompt.replace("<", "\n<").replace(">", ">\n").split("\n") if part]
        ids = [token for part in marks for token in encode([part] if part[0] == "<" else part)[1:]]
        assert splitter.split(text, ids) == expected, (text, prompt)


@needs_vllm
def test_special_tokens_do_not_stay_in_texts():
    from deltaray.generate.reasoning import Splitter

    splitter = Splitter("qwen3", make_tokenizer(special_marks=True))
    assert splitter.split("a<bos>b</think>c<pad>", encode("q")) == ("c", "ab")


@needs_vllm
def test_a_parser_that_breaks_costs_its_own_row_only():
    from deltaray.generate.reasoning import Splitter

    splitter = Splitter("qwen3", make_tokenizer())
    splitter.parser = None
    output = {"token_ids": [3], "tokens": 1, "text": "a", "finish_reason": "stop", "error": None}
    broken = splitter.divide(output, encode("q"))
    assert broken["finish_reason"] == "error" and "reasoning parser" in broken["error"]


@needs_vllm
@pytest.mark.parametrize(
    ("name", "words"), [("qwen33", "no parser 'qwen33'.*qwen3"), ("openai_gptoss", "cannot split")]
)
def test_a_parser_that_does_not_work_is_named(name, words):
    from deltaray.generate.reasoning import Splitter

    with pytest.raises(ValueError, match=words):
        Splitter(name, make_tokenizer())


def test_seeds_differ_by_answer_and_never_by_run():
    assert request_seed(0, "p", 0) == request_seed(0, "p", 0) == 3313353247608816784
    assert len({request_seed(*key) for key in [(0, "p", 0), (1, "p", 0), (0, "q", 0), (0, "p", 1)]}) == 4


@needs_vllm
def test_unseeded_sampling_and_greedy_decoding_have_no_seeds():
    from deltaray.generate.requests import sampling_parameters

    for settings in ({"temperature": 1.0, "seed": None}, {"temperature": 0.0, "seed": 3}):
        assert [one.seed for one in sampling_parameters(json.dumps(settings), ["p"], [0, 1])] == [None, None]
    seeded = sampling_parameters(json.dumps({"temperature": 1.0, "seed": 3}), ["p"], [4])
    assert [one.seed for one in seeded] == [request_seed(3, "p", 4)]


def test_weights_of_another_shape_are_refused(tmp_path):
    a = make_model(tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    other = json.loads(Path(a, "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(other))
    check_same_model(EngineSpec(a), str(tmp_path / "b"))
    with pytest.raises(ValueError, match="adapters"):
        check_same_model(EngineSpec(a, adapters=1, max_lora_rank=8), str(tmp_path / "b"))
    (tmp_path / "b" / "config.json").write_text(json.dumps(other | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="num_hidden_layers"):
        check_same_model(EngineSpec(a), str(tmp_path / "b"))


def test_metrics_name_a_folder_by_what_stays_the_same_from_job_to_job():
    assert short_name("owner/model") == "owner/model"
    assert short_name("/tmp/ray/session_1/working_dir_files/_ray_pkg_12/family/seed0/mini-m") == "seed0/mini-m"


def test_without_ray_metrics_are_silent(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    metrics = EngineMetrics("some/model")
    metrics.answer("teacher", "stop", 3, 4)
    metrics.rest()
    assert (metrics.series, metrics.sums) == ({}, {})


STANDING = """
import signal, subprocess, sys, time
from deltaray.generate.watchdog import StallWatch
watch = StallWatch(2, "some/model")
for _ in range(4):  # each step in time, all of them together not
    with watch.step():
        time.sleep(0.6)
time.sleep(2.5)  # nothing to do
core = subprocess.Popen(["sleep", "1000"])
core.send_signal(signal.SIGSTOP)
print(core.pid, flush=True)
with watch.step():
    core.wait()
"""


def test_an_engine_that_stands_still_is_ended_with_its_children() -> None:
    command = [sys.executable, "-c", STANDING]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1, ran.stderr
    assert "the engine of some/model has not ended a step for 2 s (engine.stall_seconds)" in ran.stderr
    core = int(ran.stdout)
    assert not psutil.pid_exists(core) or psutil.Process(core).status() == psutil.STATUS_ZOMBIE
