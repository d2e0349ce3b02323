"""Training that is killed: it goes on by itself or by the same command, and ends where it would have ended."""

import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file
from test_train import fill_store, metrics_of
from tiny_model import save_tiny

from deltaray.data.store import Store
from deltaray.recipe import Recipe, expand
from deltaray.train.reference.stage import reference
from deltaray.train.stage import train

STEPS = 20


def study_for(out, model, **training):
    run = {"pairing": "delta", "batch_size": 5, "epochs": 4, "learning_rate": 1e-3, "beta": 5.0}
    layout = {"workers": 2, "dtype": "float32", "micro_batch_tokens": 150, "checkpoint_steps": 4} | training
    recipe = {
        "name": "tiny",
        "out": str(out),
        "prompts": {"path": "unused.jsonl"},
        "teachers": {"big": {"model": "unused"}, "small": {"model": "unused"}},
        "pairings": {"delta": {"chosen": "big", "rejected": "small"}},
        "student": {"model": model, "max_length": 64},
        "training": {**layout, "runs": {"whole": run, "killed": run, "broken": run}},
    }
    return expand(Recipe.model_validate(recipe))


def processes(name):
    """Those of this process's Ray with something in their command lines, which Ray sets to what an actor is."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                yield process


def kill_an_actor(name):
    victim = next(processes(name), None)
    assert victim is not None, f"there is no {name} to kill"
    victim.kill()


def watched():
    """The actors that have somebody beside them who ends them when they are frozen."""
    for watcher in processes("runtime/process_watchdog.py"):
        with suppress(psutil.NoSuchProcess):
            yield watcher.parent().cmdline()[0].partition(".")[0]


class Killer:
    """A progress listener: once `killed` has come far enough its checkpoints are copied, and a worker is killed."""

    def __init__(self, store):
        self.folder, self.done = store.local / ".deltaray" / "checkpoints", False
        self.watched = set()

    def __call__(self, run, step, total, metrics):
        self.watched |= set(watched())
        if run == "killed" and 9 <= step < total and not self.done and self.copied():
            kill_an_actor("RayTrainWorker")
            self.done = True

    def copied(self):
        """Whether two complete checkpoints are there as well for `broken`, as if its command had died here.

        It has the same settings and pairs. Workers go on meanwhile and may remove what is being copied.
        """
        complete = sorted(self.folder.glob("killed/*/manifest.json"))[-2:]
        try:
            for manifest in complete:
                shutil.copytree(manifest.parent, self.folder / "broken" / manifest.parent.name)
        except (OSError, shutil.Error):
            complete = []
        if len(complete) < 2:
            shutil.rmtree(self.folder / "broken", ignore_errors=True)
        return len(complete) == 2


@pytest.fixture(scope="module")
def killed(ray_session, tmp_path_factory):
    """(store, study, what was said, watched actors) of a run whose worker is killed, beside one that is left alone."""
    folder = tmp_path_factory.mktemp("resume")
    study = study_for(folder / "out", save_tiny(folder / "student", vocabulary=2048))
    store, said = Store(study.recipe.out), []
    listener = Killer(store)
    fill_store(store)
    reference(study, store, "student", ["big", "small"], lambda *_: listener.watched.update(watched()))
    runs = [study.runs[name] for name in ("whole", "killed")]
    assert train(study, store, runs, listener, said.append) == ["whole", "killed"]
    assert listener.done
    return store, study, said, listener.watched


def weights(store, name):
    return load_file(store.local / Store.student(name) / "model.safetensors")


def without_time(lines):
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_a_killed_worker_changes_no_bit(killed):
    store, _, said, _ = killed
    files = [store.local / Store.student(name) / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert any(line.startswith("killed: resumed after step ") for line in said)
    assert without_time(metrics_of(store, "killed")) == without_time(metrics_of(store, "whole"))
    assert [line["step"] for line in metrics_of(store, "killed")] == list(range(1, STEPS + 1))


def test_workers_that_hold_models_are_watched(killed):
    *_, names = killed
    assert names >= {"ray::MapWorker(Map(ReferenceWorker))", "ray::RayTrainWorker"}


def test_damaged_checkpoints_are_left_out_and_another_number_of_workers_goes_on(killed):
    store, study, *_ = killed
    newest, before = _checkpoints(store)
    _damage(store, newest)
    alone, said = study_for(store.out, study.students["student"].model, workers=1), []
    assert train(alone, store, [alone.runs["broken"]], lambda *_: None, said.append) == ["broken"]
    assert f"broken: checkpoint {newest} is damaged or of other pairs, and is left out" in said
    assert f"broken: resumed after step {int(before.split('-')[1])}" in said
    for name, expected in weights(store, "whole").items():
        torch.testing.assert_close(weights(store, "broken")[name], expected, rtol=0, atol=1e-4)
    assert _checkpoints(store) == []


class Deadly(Store):
    """The first training worker that unpickles it is killed: it has just been handed its work."""

    def __reduce__(self):
        return _die_once, (self.out,)


def _die_once(out):
    if "RayTrainWorker" in " ".join(psutil.Process().cmdline()):
        with suppress(FileExistsError):
            Path(f"{out}-killed").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    return Store(out)


def test_actors_that_ray_does_not_replace_by_itself_are_replaced(killed):
    store, study, *_ = killed
    before = (store.local / Store.student("whole")).rename(store.local / "before")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    said, victims = [], ["ray::TrainController", "ray::Progress"]
    room = ray.available_resources()["CPU"] - 2  # the workers can be started again only where they were
    taken = placement_group([{"CPU": room}])
    assert taken.wait(60)

    def say(text):
        said.append(text)
        if len(said) == 1:  # the workers are started again: nobody tells anything now
            kill_an_actor(victims.pop())

    def listener(run, step, total, metrics):
        if 9 <= step < total and len(victims) == 1:
            kill_an_actor(victims.pop())

    assert train(study, Deadly(store.out), [study.runs["whole"]], listener, say) == ["whole"]
    remove_placement_group(taken)
    again = "whole: an actor of Ray Train died; starting the workers again"
    assert not victims
    assert said[:2] == [f"{again} (1)", f"{again} (2)"] and said[2].startswith("whole: resumed after step ")
    for file in before.glob("*.safetensors"):
        assert (store.local / Store.student("whole") / file.name).read_bytes() == file.read_bytes()


def _checkpoints(store):
    folder = store.local / ".deltaray" / "checkpoints" / "broken"
    return sorted((path.parent.name for path in folder.glob("*/manifest.json")), reverse=True)


def _damage(store, name):
    """One bit of one file, as a bad disk would."""
    file = max((store.local / ".deltaray" / "checkpoints" / "broken" / name).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
