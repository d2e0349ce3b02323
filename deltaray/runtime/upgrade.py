"""What an earlier version wrote in a way that this one does not."""

from deltaray.store import Store

FOLDERS = ("prompts", "scores", "pairs", "evaluation/samples")
"""Folders of Parquet files that hold other files, too."""


def hide_records(store: Store) -> None:
    """Renames JSON files that lie among Parquet files under plain names: they keep other tools from opening these."""
    for folder in FOLDERS:
        for path in store.listing(folder, ".json"):
            above, _, name = path.rpartition("/")
            if not name.startswith("_"):
                store.move(path, f"{above}/_{name}")
