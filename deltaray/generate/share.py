"""Which models can share an engine: those of one architecture and tokenizer; weights are swapped between units."""

import hashlib
import json
from functools import lru_cache

from deltaray.chat import load_tokenizer
from deltaray.generate.pools import Pool, engine_spec
from deltaray.generate.spec import COSMETIC
from deltaray.generate.units import Unit
from deltaray.recipe.models import Engine, Model
from deltaray.runtime.session import Capacity


def shared_pools(work: list[tuple[Model, Engine, list[Unit]]], capacity: Capacity) -> list[Pool]:
    """As few pools as can do the work: starting an engine takes longer than swapping weights."""
    groups: dict[str, list[tuple[Model, Engine, list[Unit]]]] = {}
    for item in work:
        groups.setdefault(_engine_key(item[0], item[1]), []).append(item)
    return [
        Pool(engine_spec(group[0][0], group[0][1], capacity), [unit for _, _, units in group for unit in units])
        for group in groups.values()
    ]


def _engine_key(model: Model, engine: Engine) -> str:
    """Equal for models that differ in their weights only."""
    if model.revision:  # an engine that was started from a pinned revision takes no other weights
        return f"{model.model}@{model.revision} {engine.model_dump_json()}"
    return f"{_architecture(model.model_dump_json(include=set(Model.model_fields)))} {engine.model_dump_json()}"


@lru_cache(maxsize=256)
def _architecture(model: str) -> str:
    from transformers import AutoConfig

    spec = Model.model_validate_json(model)
    config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code).to_dict()
    for name in COSMETIC:
        config.pop(name, None)
    tokenizer = load_tokenizer(spec, "model").backend_tokenizer.to_str()
    text = json.dumps(config, sort_keys=True, default=str) + tokenizer
    return hashlib.sha256(text.encode()).hexdigest()[:16]
