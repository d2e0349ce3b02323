"""Ray Tune's own CSV file of every trial, without cells that a spreadsheet would calculate."""

from typing import Any

from ray.tune.logger import CSVLoggerCallback

from deltaray.data.storage.cells import harmless


class HarmlessCsv(CSVLoggerCallback):  # type: ignore[misc]
    """Takes the place of Ray Tune's own, which it adds where there is none."""

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        super().log_trial_result(iteration, trial, cells(result))


def cells(value: Any) -> Any:
    """A result with harmless texts, also inside. Pure."""
    if isinstance(value, dict):
        return {name: cells(item) for name, item in value.items()}
    return harmless(value) if isinstance(value, str) else value
