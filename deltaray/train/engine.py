"""The student under DeepSpeed: loading it (partitioned from the start with ZeRO 3) and saving what was trained."""

import gc
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.model_files.fit import demand_fit
from deltaray.recipe.models import Student
from deltaray.recipe.training import Run, Training
from deltaray.train.deepspeed_config import deepspeed_config
from deltaray.train.probe import settle
from deltaray.train.saving import write_student
from deltaray.train.student import load_module


def join_process_group() -> None:
    """Hands Ray Train's process group to DeepSpeed, once per process."""
    if not torch.cuda.is_available():
        # A kernel for tensor-parallel inference that would be compiled on first use: a minute, and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls what torch deprecates several times a step; formatting that warning costs more than some layers.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


def start_engine(
    student: Student, training: Training, run: Run, start: str | None = None, disk: Path | None = None
) -> Any:
    """A DeepSpeed engine around `ResponseLogProbs`.

    Args:
        start: the folder of a student or adapter to go on from.
        disk: this worker's own folder for the optimizer's state; gone when the engine is stopped.
    """
    from transformers.integrations import HfDeepSpeedConfig

    config = deepspeed_config(training, run, disk)
    # While this object lives, from_pretrained partitions every weight as it is read: no worker ever holds the whole.
    partitioning = HfDeepSpeedConfig(config) if training.zero_stage == 3 else None
    torch.manual_seed(run.seed)  # a fresh adapter is the same on every worker
    module = load_module(student, training.dtype, run.lora, start)
    del partitioning
    if training.zero_stage == 3:
        demand_fit(student, None if run.lora else start)
    if training.gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()
    if disk is not None:
        _demand_disk_access(disk)
    if training.zero_stage == 3:
        for weight in module.head.own.parameters:
            deepspeed.zero.register_external_parameter(module.head, weight)
    engine = deepspeed.initialize(model=module, optimizer=_optimizer(module, run), config=config)[0]
    settle(module, student, engine.device)
    return engine


def _demand_disk_access(folder: Path) -> None:
    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
        raise StageError(
            "training.offload_folder: DeepSpeed cannot compile its disk access on this worker: install libaio "
            "(Debian, Ubuntu: `apt-get install libaio-dev`) and a C++ compiler, or leave offload_folder out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(f"training.offload_folder: {folder} cannot be made on this worker: {error.strerror}") from None


def _optimizer(module: nn.Module, run: Run) -> torch.optim.Optimizer:
    assert isinstance(run.learning_rate, float)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=run.learning_rate, betas=run.adam_betas, weight_decay=run.weight_decay, fused=True
    )


def stop_engine(engine: Any) -> None:
    """Frees weights, gradients and optimizer state for the next run of the same process."""
    offload = engine._config.zero_config.offload_optimizer
    engine.destroy()
    if offload is not None and offload.nvme_path is not None:
        shutil.rmtree(offload.nvme_path, ignore_errors=True)
    engine.optimizer = engine.module = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gathered_weights(model: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """The state on the CPU of rank 0 (other ranks: empty); a collective call, one weight at a time.

    Names that share a weight (tied embeddings) share its copy, too.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if torch.distributed.get_rank() == 0:
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
                state[name] = copies[id(tensor)]
    return state


def save_trained(
    engine: Any, tokenizer: Any, store: Store, path: str, student: Student, source: Path | None, adapter: bool
) -> None:
    """Commits a Hugging Face folder, or a PEFT adapter's, from rank 0; all ranks call it.

    Args:
        source: the folder of the untouched student, on rank 0.
    """
    model = engine.module.model
    state = gathered_weights(model, trained_only=adapter)
    if torch.distributed.get_rank() == 0:
        with tempfile.TemporaryDirectory() as folder:
            if adapter:
                model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
                tokenizer.save_pretrained(folder)
            else:
                assert source is not None
                write_student(model, state, tokenizer, student, source, Path(folder))
            store.put_folder(Path(folder), path)
    torch.distributed.barrier()
