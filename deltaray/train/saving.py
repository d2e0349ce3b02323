"""The folder of a trained student: its own weights, and beside them all that its model's folder has.

Files are taken over byte by byte where they say the same as before, so that the folder loads wherever the original
did. transformers refuses to write some of what it reads, such as a temperature without `do_sample`.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from deltaray.errors import UserError
from deltaray.model_files.fit import quiet
from deltaray.model_files.folder import INDEX, TEMPLATES, copy_beside
from deltaray.model_files.headers import SINGLE, Held, tensors_of_model
from deltaray.recipe.models import Student

PROBE = "Hello  world,\n\n\tit's 12345 + 0.5 = café 你好 <b>\n"
"""A text on which tokenizers that are not the same seldom agree."""


def write_student(
    model: Any, state: Mapping[str, Tensor], tokenizer: Any, student: Student, source: Path, folder: Path
) -> None:
    """Writes a model folder.

    Args:
        state: the weights, whole; none: all but the weights, to see whether it can be written.
        source: the folder of the untouched student.
    """
    if model.can_generate():
        model.generation_config = _token_ids(model.generation_config)
    model.save_pretrained(folder, state_dict=dict(state))
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    same_names = not state or _complete(source, folder, model)
    copy_beside(source, folder, leave=() if same_names else ("config.json",))
    if same_names:
        _set_dtype(folder / "config.json", written)
    write_tokenizer(tokenizer, student, folder)


def try_writing(model: Any, tokenizer: Any, student: Student, source: Path, key: str) -> None:
    """Writes all but the weights into a folder that is thrown away.

    Args:
        model: None for an adapter's folder, which has only the tokenizer of it.

    Raises:
        UserError: it cannot be written, with the reason.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            if model is None:
                tokenizer.save_pretrained(folder)
            else:
                write_student(model, {}, tokenizer, student, source, Path(folder))
        except Exception as error:  # transformers' own checks, those of own code, and what the disk says
            told = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                f"{key}.model: {student.model!r} loads, but what is trained from it could not be saved: {told[0]}; "
                "correct the model's files"
            ) from None


def _token_ids(own: Any) -> Any:
    """A generation configuration that can always be written; the student's own is copied over it."""
    from transformers import GenerationConfig

    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(own, name, None) for name in ids})


# --- weights ------------------------------------------------------------------------------------------------------
def _complete(source: Path, folder: Path, model: Any) -> bool:
    """Adds the tensors of the untouched student that training does not load: towers for images, further heads.

    Returns:
        whether the names are those of the untouched student's files, so that its configuration fits them.
    """
    ours = tensors_of_model(folder)
    try:
        theirs = tensors_of_model(source)
    except UserError:
        return False
    if not ours.keys() <= theirs.keys():
        return False
    tails = {name.split(".")[-2:][0] for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    left = {
        name: held
        for name, held in theirs.items()
        if name not in ours and name.split(".")[-2:][0] not in tails and "rotary_emb.inv_freq" not in name
    }
    if left:
        _add_file(folder, ours, left)
    return True


def _add_file(folder: Path, ours: Mapping[str, Held], left: Mapping[str, Held]) -> None:
    """Adds tensors in one more file, and names all files and the index as transformers does."""
    from deltaray.model_files.tensor_file import TensorFile

    files = sorted({held.file for held in ours.values()})
    names = {file: f"model-{place + 1:05d}-of-{len(files) + 1:05d}.safetensors" for place, file in enumerate(files)}
    last = f"model-{len(files) + 1:05d}-of-{len(files) + 1:05d}.safetensors"
    for file, name in names.items():
        file.rename(folder / f"{name}.part")
    for name in names.values():
        (folder / f"{name}.part").rename(folder / name)
    with TensorFile(folder / last, list(left)) as target:
        for name, held in left.items():
            with safe_open(held.file, framework="pt") as opened:
                target.add(name, opened.get_tensor(name))
    places = {name: names[held.file] for name, held in ours.items()} | dict.fromkeys(left, last)
    size = sum((folder / file).stat().st_size for file in {*names.values(), last})
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    assert not (folder / SINGLE).exists()


def _set_dtype(path: Path, written: Mapping[str, Any]) -> None:
    """The student's own configuration, with the type that its weights are stored in now."""
    config = json.loads(path.read_text(encoding="utf-8"))
    _replace_dtype(config, written["dtype"])
    config.setdefault("dtype" if "torch_dtype" not in config else "torch_dtype", written["dtype"])
    if not config.get("architectures"):
        config["architectures"] = written["architectures"]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            _replace_dtype(value, dtype)


# --- tokenizer ----------------------------------------------------------------------------------------------------
def write_tokenizer(tokenizer: Any, student: Student, folder: Path) -> None:
    """Writes the tokenizer where the folder's own files say something else than was trained with."""
    if not _is_same(tokenizer, student, folder):
        shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
        tokenizer.save_pretrained(folder)


def _is_same(tokenizer: Any, student: Student, folder: Path) -> bool:
    from transformers import AutoTokenizer

    with suppress(Exception):  # one that cannot be read is not the same
        there = AutoTokenizer.from_pretrained(folder, trust_remote_code=student.trust_remote_code)
        return _traits(there) == _traits(tokenizer)
    return False


def _traits(tokenizer: Any) -> tuple[Any, ...]:
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    return ids, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id
