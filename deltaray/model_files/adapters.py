"""A LoRA adapter's files against the model that it is served or trained on: every tensor must have its place there.

vLLM leaves out what it finds no module for, without a word, so that the model would answer as if it had no adapter.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltaray.errors import StageError, UserError
from deltaray.files import read_settings
from deltaray.model_files.headers import Held, and_others, tensors_of_file
from deltaray.model_files.lora import BASE_COPY, CONFIG, LORA, PATTERNS, PREFIX, WEIGHTS, lora_rank, pattern_values
from deltaray.model_files.names import match_names

NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules", "rank_pattern", "target_parameters")
MERGE_IT = "merge the adapter into its model (`deltaray merge --into-base`) and name that as `model`"


def check_adapter(folder: Path, key: str, skeleton: Any, held: Mapping[str, Held]) -> None:
    """UserError, led by `key`, for an adapter that is damaged, or that is not one of this base.

    Args:
        skeleton: the base on the meta device; None where transformers does not know it.
        held: the tensors of the base's files; empty where they are not on this machine.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            how = "give a folder that PEFT has saved" if name == CONFIG else "save the adapter as safetensors"
            raise UserError(f"{key}: {folder} holds no {name}; {how}")
    try:
        lora_rank(str(folder))
        tensors = tensors_of_file(folder / WEIGHTS)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    modules = _modules(tensors, f"{key}: {folder / WEIGHTS}", _rows(skeleton))
    _refuse_patterns(folder, key, modules)
    if skeleton is not None or held:
        _refuse_strangers(modules, f"{key}: {folder / WEIGHTS}", skeleton, held)
    if skeleton is not None:
        _refuse_shapes(modules, tensors, f"{key}: {folder / WEIGHTS}", skeleton)
        _refuse_holes(modules, read_settings(folder / CONFIG), f"{key}: {folder / WEIGHTS}", skeleton)


def _rows(skeleton: Any) -> int | None:
    """Rows of the embedding, where it can be had."""
    with suppress(NotImplementedError, AttributeError):
        return int(skeleton.get_input_embeddings().weight.shape[0])
    return None


def _modules(tensors: Mapping[str, Held], where: str, rows: int | None) -> dict[str, dict[str, str]]:
    """{module: {A or B: its key}}."""
    modules: dict[str, dict[str, str]] = {}
    for key, tensor in tensors.items():
        found = LORA.fullmatch(key)
        if found and key.startswith(PREFIX):
            sides = modules.setdefault(found["module"].removeprefix(PREFIX), {})
            sides[found["side"] or found["embedding"]] = key
        elif not BASE_COPY.fullmatch(key) or (rows is not None and tensor.shape[0] != rows):
            raise UserError(f"{where}: {_stranger(key, tensor, rows)}; {MERGE_IT}")
    for module, sides in modules.items():
        if len(sides) < 2:
            lacking = "A" if "B" in sides else "B"
            raise UserError(f"{where}: {module} has no lora_{lacking}; save the adapter again")
    if not modules:
        raise UserError(f"{where}: holds no LoRA tensor; save the adapter again")
    return modules


def _refuse_patterns(folder: Path, key: str, modules: Mapping[str, Any]) -> None:
    """vLLM matches the same patterns with the same names, without a limit."""
    try:
        config = read_settings(folder / CONFIG)
        for pattern in PATTERNS:
            pattern_values(folder, config, pattern, modules)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _stranger(key: str, tensor: Held, rows: int | None) -> str:
    whole = key.endswith(("embed_tokens.weight", "lm_head.weight", "base_layer.weight"))
    if whole and rows is not None and tensor.shape[0] != rows:
        return f"{key} has {tensor.shape[0]:,} rows and the model's embedding {rows:,}: its vocabulary was resized"
    return f"{key} is not a LoRA factor, and vLLM serves nothing else"


def _refuse_strangers(modules: Mapping[str, Any], where: str, skeleton: Any, held: Mapping[str, Held]) -> None:
    files = {name.removesuffix(".weight") for name in held}
    own = files if skeleton is None else {name for name, _ in skeleton.named_modules()}
    lost = [name for name in modules if name.removesuffix(".base_layer") not in own | files]
    if not lost:
        return
    near, _ = match_names(lost, own)
    other = f", which it calls {near[lost[0]]}: the adapter is of another wrapper of it" if lost[0] in near else ""
    how = MERGE_IT if other else "name the model that the adapter was trained on"
    raise UserError(f"{where}: the model has no {lost[0]}{and_others(lost)}{other}; {how}")


def _refuse_shapes(modules: Mapping[str, Any], tensors: Mapping[str, Held], where: str, skeleton: Any) -> None:
    for name, shape in _matrices(skeleton):
        if name in modules:
            down, up = (tensors[modules[name][side]].shape for side in "AB")
            update = (up[0], down[-1])
            if len(down) == len(up) == 2 and sorted(update) != sorted(shape):
                raise UserError(
                    f"{where}: {name}: updates a matrix of {update[0]} x {update[1]}, but the model's is {shape[0]} x "
                    f"{shape[1]}; name the model that the adapter was trained on"
                )


def _refuse_holes(modules: Mapping[str, Any], config: Mapping[str, Any], where: str, skeleton: Any) -> None:
    """An adapter that lacks some of the modules that it says it has."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in NARROWING):
        return
    ends = tuple(f".{target}" for target in targets)
    named = [name for name, _ in _matrices(skeleton) if name in targets or name.endswith(ends)]
    lacking = [name for name in named if name not in modules]
    if lacking and set(modules) <= set(named):
        raise UserError(f"{where}: no weights for {lacking[0]}{and_others(lacking)}; save the adapter again")


def _matrices(skeleton: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Modules with one matrix and its shape."""
    for name, module in skeleton.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            yield name, tuple(weight.shape)


# --- to go on training --------------------------------------------------------------------------------------------
def fill_adapter(adapted: Any, folder: str) -> None:
    """Loads a saved adapter's weights into a fresh one of the same settings.

    Raises:
        StageError: a tensor has no place, another shape, or a place got none.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        loaded = set_peft_model_state_dict(adapted, load_peft_weights(folder, device="cpu"))
    except RuntimeError as error:  # another shape; the first line names the class alone
        raise StageError(f"{folder}: {' '.join(str(error).split())}") from None
    wrong = None
    if strange := sorted(loaded.unexpected_keys):
        wrong = f"holds {strange[0]}{and_others(strange)}, which the adapter has no place for"
    elif missing := sorted(key for key in loaded.missing_keys if ".lora_" in key):  # the frozen base's do not count
        wrong = f"holds no {missing[0]}{and_others(missing)}"
    if wrong:
        raise StageError(f"{folder}: {wrong}; it is not an adapter with these settings of this student")
