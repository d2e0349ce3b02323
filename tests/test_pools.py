"""Pools on a real Ray: they grow while there is work, share the cluster, and give everything back at their end."""

import json
import time
from pathlib import Path
from typing import Any

import fake_engine
import pyarrow.parquet as pq
import pytest
import ray
from fake_engine import Behaviour, FakeSpec
from tiny_model import save_tiny

from deltaray.data.contracts import RESPONSES
from deltaray.data.prompts import store_prompts
from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.failures import cause_of
from deltaray.generate import engine_sharing
from deltaray.generate.answer import Work, answer, work_of
from deltaray.generate.pools import Pool, describe
from deltaray.generate.stage import responses_table
from deltaray.generate.stream import stream_units
from deltaray.generate.units import Assignment
from deltaray.recipe.models import Endpoint, Sampling, Teacher
from deltaray.recipe.recipe import Failures
from deltaray.runtime.session import Capacity

ray.cloudpickle.register_pickle_by_value(fake_engine)
UNITS = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("teacher") / "teacher")


def work(store: Store, model: str, name: str) -> Work:
    rows: list[Any] = [
        {"prompt_id": f"p{n}", "messages": [{"role": "user", "content": str(n)}], "answer": None, "source": None,
         "error": None}
        for n in range(2 * UNITS)
    ]  # fmt: skip
    store_prompts(store, rows, 16)
    teacher = Teacher(model=model, sampling=Sampling())
    return work_of(store, Assignment(name, teacher, Store.prompts, Store.responses(name), "identity", 2))


def test_a_pool_grows_shares_the_cluster_and_gives_it_back(
    ray_session: Any, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pools of one to three replicas with two CPUs each: one after the other on eight.

    No unit is answered before its pool has two replicas.
    """
    marks, store = tmp_path / "marks", Store(str(tmp_path / "out"))
    marks.mkdir()
    spec = FakeSpec(Behaviour(delay=0.05, marks=str(marks), replicas=2), cpus=2, max_replicas=3, requests_in_flight=2)
    monkeypatch.setattr(engine_sharing, "pool_spec", lambda teachers, capacity: spec)
    monkeypatch.setattr(
        engine_sharing, "_engine_key", lambda teacher, adapted: teacher.model_dump_json() + str(id(teacher))
    )
    works = [work(store, tokenizer, name) for name in ("a", "b")]
    said: list[str] = []
    everything = ray.cluster_resources()["CPU"]
    answer(
        store, works, Capacity(everything, 0), responses_table, RESPONSES, Failures(), lambda *_: None, said.append
    )  # fmt: skip
    assert [text.partition(";")[0] for text in said] == ["pools at once: a"] and "as room gets free: b" in said[0]
    replicas: dict[str, set[str]] = {"a": set(), "b": set()}
    for file in marks.iterdir():
        for line in file.read_text().splitlines():
            replicas[json.loads(line)["name"]].add(file.stem)
    assert all(2 <= len(pids) <= 3 for pids in replicas.values()), replicas
    assert not replicas["a"] & replicas["b"]
    for name in replicas:
        files = store.committed(Store.responses(name))
        keys = [key for file in files for key in pq.read_table(Path(store.out) / file)["prompt_id"].to_pylist()]
        assert sorted(keys) == sorted({f"p{n}" for n in range(2 * UNITS)})
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < everything and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == everything


def test_a_failure_is_told_by_its_cause_and_not_by_what_ray_wraps_around_it(ray_session: Any) -> None:
    def broken(unit: Any) -> Any:
        raise TimeoutError("the store\ndid not answer")

    with pytest.raises(ray.exceptions.RayError) as met:
        list(stream_units([{"name": "t", "model": "m", "rows": [0], "samples": [0]}], FakeSpec(), broken, broken))
    assert cause_of(met.value) == "TimeoutError: the store\ndid not answer"


def test_an_engine_that_breaks_at_every_start_is_given_up_with_its_own_words(
    ray_session: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray itself says no more than that the actor is out of reach."""
    unit = {
        "name": "t", "model": "m", "rows": [0], "samples": [0], "prompt_ids": ["p"], "refused": [None],
        "messages": [[]], "tools": [None], "token_ids": [[1]], "sampling": "{}",
    }  # fmt: skip
    spec = FakeSpec(Behaviour(breaks="no kernel for heads of 7"))
    with pytest.raises(StageError) as met:
        list(stream_units([unit], spec, lambda unit: unit, lambda unit: unit))
    assert str(met.value).startswith("the fake engine broke: RuntimeError: no kernel for heads of 7\n")
    assert "run the same command again to resume" in str(met.value)
    assert "RuntimeError: no kernel for heads of 7" in capfd.readouterr().err  # in the log, when a command runs


def test_what_runs_together_is_said_before_it_runs() -> None:
    unit = {"name": "t", "rows": [0, 1], "samples": [0, 1, 2]}
    pools = [
        Pool(FakeSpec(cpus=2, max_replicas=most), [unit | {"name": name}] * 4)
        for name, most in {"a": 1, "b": 3, "c": 1}.items()
    ]
    text = describe(pools, Capacity(7, 0))
    assert text.startswith("pools at once: a, c; then, as room gets free: b; at most ")


# --- who shares what ----------------------------------------------------------------------------------------------
def names(groups: list[Pool]) -> list[list[str]]:
    return [pool.names for pool in groups]


def unit(name: str) -> dict[str, Any]:
    return {"name": name, "rows": [0], "samples": [0], "model": name}


def test_models_of_one_architecture_share_an_engine_and_adapters_their_base(tokenizer: str, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    larger = save_tiny(tmp_path / "larger", vocabulary=128)
    teachers = {
        "one": Teacher(model=tokenizer),
        "two": Teacher(model=other),
        "larger": Teacher(model=larger),
        "server": Teacher(model="m", endpoint=Endpoint(url="http://localhost:1/v1")),
    }
    pools = engine_sharing.shared_pools([(teacher, [unit(name)]) for name, teacher in teachers.items()], Capacity(8, 0))
    assert names(pools) == [["one", "two"], ["larger"], ["server"]]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    (adapter / "adapter_model.safetensors").touch()
    teachers["adapted"] = Teacher(model=tokenizer, adapter=str(adapter))
    pools = engine_sharing.shared_pools([(teacher, [unit(name)]) for name, teacher in teachers.items()], Capacity(8, 0))
    assert names(pools) == [["one", "adapted"], ["two"], ["larger"], ["server"]]
