"""DeepSpeed's configuration for a run. Pure."""

from pathlib import Path
from typing import Any

from deltaray.recipe.training import Run, Training

BUCKET = 50_000_000
"""Elements reduced at a time; DeepSpeed's default of 5e8 would allocate 2 GB of float32 per worker at once."""


def deepspeed_config(training: Training, run: Run, disk: Path | None = None) -> dict[str, Any]:
    """What `deepspeed.initialize` gets beside the optimizer; `disk`: where its state waits, if not in memory.

    The loop cuts batches by tokens, sets the accumulation boundary itself and divides the loss itself (by what the
    global batch holds); the numbers named here only tell DeepSpeed that gradients are accumulated.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": run.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: no compiler needed, the same on CPU and GPU
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": _zero(training, disk),
        **_precision(training),
    }


def _zero(training: Training, disk: Path | None) -> dict[str, Any]:
    # DeepSpeed's stage 0 keeps no float32 weights beside bfloat16 ones (small steps vanish) and tells no gradient norm;
    # stage 1 computes the same with less memory.
    stage = max(1, training.zero_stage)
    settings: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        settings["stage3_prefetch_bucket_size"] = BUCKET
    if training.offload != "none":
        settings["offload_optimizer"] = {"device": "cpu"}
    if disk is not None:
        settings["offload_optimizer"] = {"device": "nvme", "nvme_path": str(disk)}
    if training.offload == "all":
        settings["offload_param"] = {"device": "cpu"}
    return settings


def _precision(training: Training) -> dict[str, Any]:
    if training.dtype == "float32":
        return {}
    # Small steps (5e-8) would vanish in sums of bfloat16 gradients.
    return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
