"""What an earlier version wrote in places where this one does not."""

from deltaray.data.store import Store
from deltaray.generate.extend.stage import COUNTS
from deltaray.score.compare import AGREEMENT


def move_records(store: Store) -> None:
    """Moves JSON files that lay among Parquet files, where they keep other tools from opening these."""
    moved = {"scores/agreement.json": AGREEMENT, "prompts/extensions.json": COUNTS}
    found = {path: target for path, target in moved.items() if store.exists(path)}
    for path in store.listing("evaluation/samples", ".json"):
        _, _, model, task = path.split("/", 3)
        found[path] = Store.sample_results(model, task.removesuffix(".json"))
    for path, target in found.items():
        store.move(path, target)
    store.delete(path for path in store.listing("pairs", ".json") if "/_" not in path)  # their pairs are made again
