"""What is known of every trial: one JSON file each, which outlives the command and Ray Tune's own state."""

from typing import Any

from deltaray.data.storage.filesystem import together
from deltaray.data.store import Store
from deltaray.recipe.search_space import Trial

Record = dict[str, Any]
OVER = ("finished", "stopped", "failed")
"""States in which a trial is not tried again; `running` is that of a trial whose command was killed, too."""


RECORD = {"name": str, "state": str, "label": str, "choice": dict, "pairing": str, "settings": dict}
"""What its readers rely on."""


def read_records(store: Store) -> dict[str, Record]:
    """All records by the trial's name."""
    paths = store.committed(Store.trials, ".json")
    return {record["name"]: record for record in together(lambda path: store.read_json(path, RECORD), paths)}


def write_record(store: Store, trial: Trial, state: str, **facts: Any) -> Record:
    """Puts a trial into a state, in place of an earlier one."""
    record = {
        "name": trial.name,
        "label": trial.label,
        "state": state,
        "choice": trial.choice,
        "pairing": trial.pairing_name,
        "settings": settings_of(trial),
        **facts,
    }
    store.write_json(f"{Store.trials}/{trial.name}.json", record)
    return record


def settings_of(trial: Trial) -> dict[str, Any]:
    """What a reader wants to know of a trial, flat."""
    pairing, run = trial.pairing, trial.run
    lora = f"rank {run.lora.rank}" if run.lora else None
    return {
        "chosen": pairing.chosen or None,
        "rejected": pairing.rejected or None,
        "scorer": pairing.scorer,
        "min_delta": pairing.min_delta,
        "max_delta": pairing.max_delta,
        "pairs": run.pairs,
        "loss": run.loss,
        "learning_rate": run.learning_rate,
        "beta": run.beta,
        "lora": lora,
    }


def is_over(record: Record | None, seeds: list[int], retry_failed: bool = False) -> bool:
    """Whether a trial is done with, for these seeds of the study."""
    if record is None or record["state"] not in OVER or record.get("seeds") != seeds:
        return False
    return not (retry_failed and record["state"] == "failed")
