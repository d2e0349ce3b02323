"""Writing what has been merged: a folder that is there whole or not at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaray.data.storage.filesystem import remove, temporary, unless_full
from deltaray.errors import UserError


@contextmanager
def whole_folder(out: Path, mark: str) -> Iterator[Path]:
    """A hidden folder to write into, which takes the name `out` when all is well.

    Args:
        mark: a file that folders of this kind hold; one that is there already is replaced only if it has it.

    Raises:
        UserError: something else is at `out`, or it cannot be written.
        StageError: the disk is full.
    """
    refuse_occupied(out, mark)
    hidden = temporary(out)
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    try:
        with unless_full(out):
            yield hidden
            remove(out)
            hidden.replace(out)
    finally:
        remove(hidden)


def refuse_occupied(out: Path, mark: str) -> None:
    """UserError unless `out` is free, an empty folder, or an earlier result of ours."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / mark).is_file()):
        raise UserError(f"--out {out}: is there already and no earlier merge; name another folder")


def adapter_config(
    ranks: Mapping[str, int], targets: list[str], base: str | None, like: Mapping[str, Any]
) -> dict[str, Any]:
    """The merged adapter's adapter_config.json: scaling 1 everywhere, written such that all readers agree on it.

    alpha equals the rank in every module, also for readers that know no patterns. Nothing else is set that PEFT or
    vLLM would not take for granted.
    """
    rank = max(ranks.values())
    pattern = {module: lower for module, lower in ranks.items() if lower != rank}
    kept = {key: like[key] for key in ("task_type", "fan_in_fan_out", "auto_mapping", "revision") if like.get(key)}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        **kept,
    }
