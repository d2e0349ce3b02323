"""Which models can share an engine: those of one architecture and tokenizer; weights are swapped between units.

LoRA adapters of one base need no swap at all: they are served on top of it, side by side.
"""

import hashlib
import json
from functools import lru_cache

from deltaray.data.tokens import load_tokenizer
from deltaray.generate.endpoint import EndpointSpec
from deltaray.generate.engine_settings import COSMETIC
from deltaray.generate.pools import Pool
from deltaray.generate.spec import EngineSpec
from deltaray.generate.stream import Spec
from deltaray.generate.units import Unit
from deltaray.model_files.lora import lora_rank
from deltaray.recipe.models import Model, Teacher
from deltaray.runtime.session import Capacity


def shared_pools(work: list[tuple[Teacher, list[Unit]]], capacity: Capacity) -> list[Pool]:
    """As few pools as can do the work: starting an engine takes longer than swapping weights."""
    groups: dict[str, list[tuple[Teacher, list[Unit]]]] = {}
    adapted = {teacher.model for teacher, _ in work if teacher.adapter}
    for item in work:
        groups.setdefault(_engine_key(item[0], adapted), []).append(item)
    return [
        Pool(
            pool_spec([teacher for teacher, _ in group], capacity),
            [unit for _, units in group for unit in units],
            group[0][0].engine.units_in_flight,
        )
        for group in groups.values()
    ]


def pool_spec(teachers: list[Teacher], capacity: Capacity) -> Spec:
    """The replicas that serve teachers which can share them."""
    first = teachers[0]
    if first.endpoint is not None:
        return EndpointSpec.of(first.model, first.endpoint)
    engine, adapters = first.engine, {teacher.adapter for teacher in teachers if teacher.adapter}
    return EngineSpec(
        model=first.model,
        dtype=engine.dtype,
        max_model_len=engine.max_model_len,
        tensor_parallel=engine.tensor_parallel,
        pipeline_parallel=engine.pipeline_parallel,
        engine_kwargs=engine.arguments | _loading(first),
        adapters=len(adapters),
        max_lora_rank=max(map(lora_rank, adapters), default=0),
        accelerator=engine.accelerator,
        gpus=capacity.gpus_of(engine),
        cpus=engine.cpus,
        min_replicas=engine.replicas,
        max_replicas=engine.max_replicas or engine.replicas,
        stall_seconds=engine.stall_seconds,
    )


def _loading(model: Model) -> dict[str, object]:
    revision = {"revision": model.revision} if model.revision else {}
    return revision | ({"trust_remote_code": True} if model.trust_remote_code else {})


def _engine_key(teacher: Teacher, adapted: set[str]) -> str:
    """Equal for models that differ in their weights only, or in their adapters only.

    An engine that serves adapters takes no other weights, so `adapted` models keep to themselves.
    """
    if teacher.endpoint is not None:
        return f"{teacher.model} {teacher.endpoint.model_dump_json()}"
    engine = teacher.engine.model_dump_json()
    if teacher.revision or teacher.model in adapted:  # nor does one that was started from a pinned revision
        return f"{teacher.model}@{teacher.revision} {engine}"
    return f"{_architecture(teacher.model_dump_json(include=set(Model.model_fields)))} {engine}"


@lru_cache(maxsize=256)
def _architecture(model: str) -> str:
    from transformers import AutoConfig

    spec = Model.model_validate_json(model)
    config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code).to_dict()
    for name in COSMETIC:
        config.pop(name, None)
    tokenizer = load_tokenizer(spec, "model")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spoken = backend.to_str() if backend else json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()])
    text = json.dumps(config, sort_keys=True, default=str) + spoken
    return hashlib.sha256(text.encode()).hexdigest()[:16]
