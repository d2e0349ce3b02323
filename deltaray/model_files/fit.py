"""Whether a checkpoint's tensors are those that its architecture asks for, found out without reading a weight.

The model is built on torch's meta device, where tensors have shapes and no content, and is loaded by transformers
itself from tensors of the shapes that the files' headers tell. So renamed, fused and ignored tensors are judged by
the same rules as when the weights are loaded.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deltaray.errors import StageError
from deltaray.model_files.folder import cached_folder
from deltaray.model_files.headers import Held, and_others, tensors_of_model
from deltaray.recipe.models import Model

CAUSAL, SCORING = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
UNUSED = {SCORING: r"(^|\.)lm_head\."}
"""What files may hold besides: a reward model has no use for the output layer of the language model that it was."""


def read_config(model: Model) -> Any:
    """The model's configuration as transformers reads it.

    Raises:
        OSError, ValueError: there is none, or it is of a kind that transformers does not know.
    """
    from transformers import AutoConfig

    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return AutoConfig.from_pretrained(model.model, **options)


def build(model: Model, kind: str = CAUSAL, config: Any = None) -> Any:
    """The model without its weights, on the meta device.

    Args:
        kind: the auto class of transformers that will load it.

    Raises:
        OSError, ValueError: transformers knows no model of this kind for the configuration.
        Exception: what the architecture raises for a configuration that is wrong in itself.
    """
    import torch
    import transformers
    from transformers import initialization

    config = config or read_config(model)
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        return getattr(transformers, kind).from_config(config, trust_remote_code=model.trust_remote_code)


def loading_info(skeleton: Any, held: Mapping[str, Held]) -> dict[str, Any]:
    """What transformers would say after loading these tensors: `missing_keys`, `unexpected_keys`, `mismatched_keys`."""
    import torch

    state = {name: torch.empty(it.shape, dtype=torch.bfloat16, device="meta") for name, it in held.items()}
    with quiet():
        _, info = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=state,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return dict(info)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports and progress bars about a model that is only tried."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def misfit(info: Mapping[str, Any], kind: str = CAUSAL, unexpected: bool = True) -> str | None:
    """What is wrong with weights that were loaded, in words; None if every tensor found its place.

    Args:
        info: transformers' loading info.
        unexpected: also tell of tensors that the model has no place for.
    """
    strange = [name for name in sorted(info["unexpected_keys"]) if not re.search(UNUSED.get(kind, "$^"), name)]
    if missing := sorted(info["missing_keys"]):
        near = strange or sorted(info["unexpected_keys"])
        near.sort(key=lambda name: -_likeness(name, missing[0]))
        instead = (
            f"; the files hold {near[0]}{and_others(near)}, which this model has no place for: rename what is the "
            "same, or name the right model"
            if near
            else "; name a model whose files are whole"
        )
        return f"no weights for {missing[0]}{and_others(missing)}, which would be made up at random{instead}"
    if wrong := sorted(info["mismatched_keys"]):
        name, theirs, ours = wrong[0]
        return (
            f"{name} is {list(theirs)} in the files{and_others(wrong)}, and config.json asks for {list(ours)}; correct "
            "config.json, or save the model again"
        )
    if strange and unexpected:
        return (
            f"the files hold {strange[0]}{and_others(strange)}, which the model has no place for: it would be left "
            "out; remove it from the files, or name the right model"
        )
    return None


def _likeness(name: str, wanted: str) -> float:
    """How probable it is that one name was meant for the other; heads go by many names."""
    head = re.search(r"head|score|value|reward|classif|regress", name) is not None
    return difflib.SequenceMatcher(None, name, wanted).ratio() + head


def demand_fit(model: Model, folder: str | None = None) -> None:
    """For loaders that do not tell which tensors they left out, as under ZeRO 3.

    Args:
        folder: where weights come from, if not from the model itself.

    Raises:
        StageError: tensors are missing, too many, or of another shape.
    """
    found = cached_folder(folder or model.model, None if folder else model.revision)
    if found is None or is_quantized(config := read_config(model)):
        return
    wrong = misfit(loading_info(build(model, config=config), tensors_of_model(found)))
    if wrong:
        raise StageError(f"{found}: {wrong}")


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint holds quantised weights, whose names and shapes are those of its method."""
    return bool(getattr(config, "quantization_config", None))


def positions(config: Any) -> int | None:
    """The longest sequence that a model has positions for, in tokens; None where nothing limits it.

    Where a scaling of rotary positions leaves open whether it is counted in already, the larger number.
    """
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    limit = next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
    relative = getattr(text, "relative_attention", False) and not getattr(text, "position_biased_input", True)
    if limit is None or limit <= 0 or relative or getattr(text, "alibi", False):
        return None
    return int(max([limit, *(_scaled(limit, rope) for rope in _ropes(text))]))


def is_rotary(config: Any) -> bool:
    """Whether positions are rotations, which longer texts go on with; otherwise they are rows of a table, which end."""
    text = config.get_text_config()
    return any(hasattr(text, name) for name in ("rope_parameters", "rope_scaling", "rope_theta"))


def _ropes(text: Any) -> Iterable[Mapping[str, Any]]:
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [given] if "rope_type" in given else [item for item in given.values() if isinstance(item, dict)]


def _scaled(limit: int, rope: Mapping[str, Any]) -> float:
    factor = rope.get("factor") or 1.0
    if rope.get("rope_type") in ("linear", "dynamic"):
        return float(limit * factor)
    return float((rope.get("original_max_position_embeddings") or 0) * factor)
