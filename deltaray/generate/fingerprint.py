"""What a response is made from: responses that differ in any of this never mix, and what is not here may change.

Folders and files count by their content, so that they can be moved; the sizes of batches and caches do not count.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from deltaray.data.tokens import CLOCK
from deltaray.model_files.folder import answering_files
from deltaray.recipe.models import Model, Teacher

SAMPLED_BYTES = 1 << 20
"""How much of a file's beginning and end goes into a fingerprint."""
INDIFFERENT_ARGUMENTS = frozenset(
    {
        "aggregate_engine_logging", "async_scheduling", "attention_backend", "block_size", "compilation_config",
        "cpu_offload_gb", "cudagraph_capture_sizes", "device_ids", "disable_custom_all_reduce", "disable_log_stats",
        "distributed_executor_backend", "download_dir", "enable_chunked_prefill", "enable_prefix_caching",
        "enable_sleep_mode", "enforce_eager", "fully_sharded_loras", "gpu_memory_utilization", "hf_token",
        "kv_cache_memory_bytes", "kv_cache_metrics", "kv_cache_metrics_sample", "log_level",
        "long_prefill_token_threshold", "max_cpu_loras", "max_cudagraph_capture_size", "max_lora_rank", "max_loras",
        "max_num_batched_tokens", "max_num_scheduled_tokens", "max_num_seqs", "max_parallel_loading_workers",
        "model_loader_extra_config", "num_gpu_blocks_override", "numa_bind", "numa_bind_nodes",
        "prefix_caching_hash_algo", "safetensors_load_strategy", "scheduling_policy", "use_tqdm_on_load",
    }
)  # fmt: skip
"""Engine arguments that concern speed, memory or the way to the weights, not what is answered."""


def generation_identity(teacher: Teacher) -> dict[str, Any]:
    """What decides a teacher's responses besides the prompt and the sample's index. Reads its local files.

    How many samples are asked for is not part of it: more of them only add rows.
    """
    sampling = teacher.sampling.model_dump(mode="json", exclude={"samples"})
    asked = {**sampling, "system": teacher.system}
    if teacher.endpoint is not None:
        return {"model": teacher.model, "endpoint": teacher.endpoint.url, "body": teacher.endpoint.body, **asked}
    engine = teacher.engine
    return {
        **model_identity(teacher),
        **asked,
        "adapter": None if teacher.adapter is None else fingerprint(Path(teacher.adapter)),
        "reasoning": teacher.reasoning,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "engine_arguments": {
            name: value for name, value in engine.arguments.items() if name not in INDIFFERENT_ARGUMENTS
        },
    }


def identity_digest(identity: dict[str, Any]) -> str:
    """12 hex digits that name an identity; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def model_identity(model: Model) -> dict[str, Any]:
    """What a model is, wherever it lies: the content of a folder, or a hub id with its revision."""
    described = model.model_dump(mode="json", include=set(Model.model_fields))
    if model.date is None or not _asks_for_the_date(model):
        del described["date"]
    if model.is_local:
        described["model"] = fingerprint(Path(model.model))
    if model.chat_template is not None and Path(model.chat_template).is_file():  # else a name among the model's own
        described["chat_template"] = hashlib.sha256(Path(model.chat_template).read_bytes()).hexdigest()[:16]
    return described


def _asks_for_the_date(model: Model) -> bool:
    """Whether a template of the model may write the date; of what is on a hub that is not known yet."""
    if not model.is_local:
        return True
    places = [Path(model.model), Path(model.model) / "additional_chat_templates"]
    files = [*(file for place in places for file in place.glob("*.jinja")), places[0] / "tokenizer_config.json"]
    files += [Path(model.chat_template)] if model.chat_template else []
    return any(CLOCK.encode() in file.read_bytes() for file in files if file.is_file())


def fingerprint(folder: Path) -> str:
    """Tells two versions of a local model or adapter apart without reading all its weights."""
    digest = hashlib.sha256()
    for name in answering_files(folder):
        digest.update(f"{name} ".encode())
        add_sampled(digest, folder / name)
    return digest.hexdigest()[:16]


def add_sampled(digest: Any, file: Path) -> None:
    """Adds a file's size, beginning and end to a digest of hashlib: large files are told apart without reading all."""
    size = file.stat().st_size
    digest.update(f"{size}\n".encode())
    with file.open("rb") as source:
        digest.update(source.read(SAMPLED_BYTES))
        source.seek(max(0, size - SAMPLED_BYTES))
        digest.update(source.read())
