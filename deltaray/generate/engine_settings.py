"""What makes an engine, worked out without vLLM: its arguments, its environment, what it reserves in Ray."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaray.model_files.lora import LORA_RANKS

CPU_CACHE_BYTES = 512 << 20  # KV cache of an engine on CPU: plenty for the small models that fit there
# What may differ between two models that share an engine: how they were saved, not what they are.
COSMETIC = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
ADAPTERS_AT_ONCE = 8  # adapters in one batch: each takes memory beside the weights; further ones take turns
CPU_REQUESTS, GPU_REQUESTS = 256, 1024  # vLLM's default max_num_seqs for offline work (256 on GPUs under 70 GiB, too)


@dataclasses.dataclass(frozen=True)
class EngineSettings:
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
    accelerator: str | None = None  # Ray's name of the GPU that a replica must have
    adapters: int = 0  # how many LoRA adapters of `model` the units use
    max_lora_rank: int = 0  # the largest `lora_rank` among them
    stall_seconds: float = 600.0  # a step that lasts longer has come to a stand

    def __post_init__(self) -> None:
        """ValueError for numbers that no engine could have."""
        if min(self.tensor_parallel, self.pipeline_parallel, self.min_replicas) < 1:
            raise ValueError("tensor_parallel, pipeline_parallel and min_replicas are at least 1")
        if self.max_replicas < self.min_replicas or min(self.gpus, self.cpus, self.adapters) < 0:
            raise ValueError("max_replicas is at least min_replicas; gpus, cpus and adapters are not negative")
        if self.adapters and not 0 < self.max_lora_rank <= LORA_RANKS[-1]:
            raise ValueError(f"with adapters max_lora_rank is 1 to {LORA_RANKS[-1]}")

    @property
    def world(self) -> int:
        """Processes (GPUs, where there are any) that one copy of the weights is spread over."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments; `engine_kwargs` has the last word."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "tensor_parallel_size": self.tensor_parallel,
            "pipeline_parallel_size": self.pipeline_parallel,
            "distributed_executor_backend": "uni" if self.world == 1 else "mp",
            "use_tqdm_on_load": False,
        }
        if self.gpus == 0:
            # Without compilation vLLM 0.32 skips on CPU the warm-up that makes the buffers between pipeline stages.
            arguments |= {"enforce_eager": self.pipeline_parallel == 1, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
            # A prompt cut over two steps makes vLLM 0.32 take back a draw of its seed, which ends the engine on CPU.
            arguments |= {"enable_chunked_prefill": False}
        elif self.gpus < 1:  # share the card as Ray shares it, a tenth left for what is not vLLM's
            arguments |= {"gpu_memory_utilization": round(0.9 * self.gpus, 3)}
        return arguments | self._lora_arguments() | dict(self.engine_kwargs)

    def _lora_arguments(self) -> dict[str, Any]:
        if not self.adapters:
            return {}
        rank = next(rank for rank in LORA_RANKS if rank >= self.max_lora_rank)
        arguments = {"enable_lora": True, "max_lora_rank": rank, "max_cpu_loras": self.adapters + 1}
        if self.gpus == 0:
            # vLLM 0.32 on CPU gives requests without an adapter the last slot's (vllm-project/vllm#48421): keep that
            # one empty.
            return arguments | {"max_loras": self.adapters + 1}
        return arguments | {"max_loras": min(self.adapters, ADAPTERS_AT_ONCE)}

    @property
    def spans_nodes(self) -> bool:
        """Whether vLLM places its own Ray workers; the replica's actor then holds no GPU itself."""
        return self.arguments["distributed_executor_backend"] == "ray"

    @property
    def ray_options(self) -> dict[str, Any]:
        """Ray's options of a replica's actor besides its CPUs and environment."""
        options: dict[str, Any] = {"num_gpus": 0 if self.spans_nodes else self.gpus}
        return options | ({"accelerator_type": self.accelerator} if self.accelerator else {})

    @property
    def requests_in_flight(self) -> int:
        """Requests that keep one replica's batch full."""
        default = GPU_REQUESTS if self.gpus else CPU_REQUESTS * self.world
        return int(self.engine_kwargs.get("max_num_seqs") or default)

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
            variables["OMP_NUM_THREADS"] = str(max(1, int(self.cpus / self.world)))
        if self.gpus == 0 or self.spans_nodes:
            # In process, the placement group that vLLM's ray executor makes belongs to the actor and dies with it.
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return variables
