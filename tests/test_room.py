"""Why a stage stands still: a real job that has the room of another, and the words for it."""

import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest

from deltaray.runtime import scheduling_hints
from deltaray.runtime.scheduling_hints import Crowd, RoomWatch, look

HOLDER = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=3)
class Holder:
    def ready(self):
        return True

held = [Holder.remote() for _ in range(2)]
print(ray.get([it.ready.remote() for it in held]), flush=True)
time.sleep(600)
"""


def test_the_words_name_what_waits_what_is_free_and_who_has_the_rest() -> None:
    others = [("`python a.py` (process 7 on 10.0.0.1)", Counter(Engine=2, Writer=1)), ("job 04", Counter(Holder=1))]
    crowd = Crowd([({"CPU": 1, "GPU": 2}, 3), ({"CPU": 4}, 1)], {"CPU": (6, 8), "GPU": (4, 4)}, others)
    assert crowd.told() == (
        "the cluster has no room for 3 x 1 CPU + 2 GPU, 1 x 4 CPU; free are 2 of 8 CPUs, 0 of 4 GPUs; beside it run "
        "`python a.py` (process 7 on 10.0.0.1): 2 Engine, 1 Writer; job 04: 1 Holder"
    )
    assert Crowd([], crowd.room, others).told() is None
    group = "69550c89ef6e2419e4a0b20069c004000000"
    inside = {
        f"bundle_group_{group}": 0.001,
        f"CPU_group_1_{group}": 2,
        f"CPU_group_{group}": 2,
        f"GPU_group_{group}": 1,
    }
    assert "no room for 1 x 2 CPU + 1 GPU;" in (Crowd([(inside, 1)], {}, others).told() or "")
    many = Crowd(crowd.demands, {}, [(f"job {n}", Counter(A=1)) for n in range(8)]).told()
    assert many is not None and many.endswith("job 4: 1 A; 3 more")


def test_another_jobs_room_is_seen_and_told_once(ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INTERVAL": 0.2, "PATIENCE": 1.0}.items():
        monkeypatch.setattr(scheduling_hints, name, value)
    address = ray_session.get_runtime_context().gcs_address
    with subprocess.Popen([sys.executable, "-c", HOLDER, address], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline().strip() == "[True, True]"
            waiting = ray_session.remote(num_cpus=5)(lambda: "done").remote()
            said: list[str] = []
            with RoomWatch(lambda: 0, said.append):
                deadline = time.monotonic() + 60
                while not said and time.monotonic() < deadline:
                    time.sleep(0.1)
                time.sleep(1)
            assert len(said) == 1
            assert "has no room for 1 x 5 CPU; free are 2 of 8 CPUs" in said[0]
            assert f"(process {other.pid} on " in said[0] and "2 Holder" in said[0]
        finally:
            other.kill()
    assert ray_session.get(waiting) == "done"  # the room of a dead job is free again
    deadline = time.monotonic() + 60
    while look().told() and time.monotonic() < deadline:  # Ray's summary comes some seconds later
        time.sleep(0.5)
    assert look().told() is None


def test_progress_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INTERVAL": 0.02, "PATIENCE": 0.5}.items():
        monkeypatch.setattr(scheduling_hints, name, value)
    monkeypatch.setattr(scheduling_hints, "look", lambda: Crowd([({"CPU": 1}, 1)], {}, []))
    said: list[str] = []
    with RoomWatch(time.monotonic, said.append):
        time.sleep(1.2)
    assert not said
