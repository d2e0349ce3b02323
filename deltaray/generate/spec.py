"""What makes an engine, worked out without vLLM: its arguments, its environment, what it reserves in Ray."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPU_CACHE_BYTES = 512 << 20  # KV cache of an engine on CPU: plenty for the small models that fit there
# What may differ between two models that share an engine: how they were saved, not what they are.
COSMETIC = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """What makes an engine. Units of several models may share it when only the weights differ.

    `gpus` and `cpus` are what one replica reserves in Ray; gpus 0 runs vLLM on the CPU, a fraction shares a GPU.
    With tensor_parallel * pipeline_parallel > 1 a replica sits on one node (`mp` executor); one that spans nodes
    needs engine_kwargs {"distributed_executor_backend": "ray"}.
    """

    model: str  # folder or hub id whose config and tokenizer start the engine
    dtype: str = "auto"
    max_model_len: int | None = None  # tokens of prompt and answer together; None: what the model declares
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    engine_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gpus: float = 1.0
    cpus: float = 1.0
    min_replicas: int = 1
    max_replicas: int = 1

    def __post_init__(self) -> None:
        """ValueError for numbers that no engine could have."""
        if min(self.tensor_parallel, self.pipeline_parallel, self.min_replicas) < 1:
            raise ValueError("tensor_parallel, pipeline_parallel and min_replicas are at least 1")
        if self.max_replicas < self.min_replicas or min(self.gpus, self.cpus) < 0:
            raise ValueError("max_replicas is at least min_replicas; gpus and cpus are not negative")

    @property
    def arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments; `engine_kwargs` has the last word."""
        world = self.tensor_parallel * self.pipeline_parallel
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "tensor_parallel_size": self.tensor_parallel,
            "pipeline_parallel_size": self.pipeline_parallel,
            "distributed_executor_backend": "uni" if world == 1 else "mp",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self.gpus == 0:
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
        elif self.gpus < 1:  # share the card as Ray shares it, a tenth left for what is not vLLM's
            arguments |= {"gpu_memory_utilization": round(0.9 * self.gpus, 3)}
        return arguments | dict(self.engine_kwargs)

    @property
    def spans_nodes(self) -> bool:
        """Whether vLLM places its own Ray workers; the replica's actor then holds no GPU itself."""
        return self.arguments["distributed_executor_backend"] == "ray"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the engine's process; they must be set before it imports torch."""
        variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CONFIGURE_LOGGING": "1"}
        variables["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
        if Path(self.model).is_dir():
            variables["HF_HUB_OFFLINE"] = "1"  # a folder needs no hub, and an unreachable one costs minutes
        if self.gpus == 0:
            # nobind: several engines share the cores instead of all being pinned to the first ones.
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            variables["OMP_NUM_THREADS"] = str(max(1, int(self.cpus)))
        if self.gpus == 0 or self.spans_nodes:
            # In process, the placement group that vLLM's ray executor makes belongs to the actor and dies with it.
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return variables
