"""The recipe's training section: the students to train, and how the work is laid out."""

from typing import Literal

from pydantic import Field, field_validator

from deltaray.recipe.models import Section

LossName = Literal["dpo_norm", "dpo", "sft"]
"""`dpo_norm`: length-normalised DPO (papers' default); `dpo`: summed; `sft`: imitate the chosen response."""


class Run(Section):
    """One student to train."""

    pairing: str
    loss: LossName = "dpo_norm"
    beta: float = Field(5.0, gt=0)
    learning_rate: float | list[float] = 5e-8
    """A list is a grid: each is trained, and the best on `evaluation.selection` takes the run's name."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    min_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    """Where the schedule ends, as a share of the peak."""
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step, over all workers."""
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: int = 0
    """Seeds the order of the pairs (the study's seed is added)."""

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | list[float]) -> float | list[float]:
        rates = value if isinstance(value, list) else [value]
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise ValueError("one positive number, or a list of different positive numbers (a grid)")
        return value


class Training(Section):
    runs: dict[str, Run]
    workers: int = Field(1, ge=1)
    """Data-parallel workers (processes), each with `gpus_per_worker` GPUs."""
    gpus_per_worker: int | None = Field(None, ge=0)
    """Default: 1 if the cluster has GPUs, else 0."""
    cpus_per_worker: float = Field(1.0, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 3
    """0 runs as 1: DeepSpeed's stage 0 tells no gradient norm and saves no memory over it."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    micro_batch_size: int = Field(1, ge=1)
    """Pairs per worker and forward pass; gradients are accumulated up to a run's batch_size."""
    gradient_checkpointing: bool = False
    reference_batch_size: int = Field(16, ge=1)
    """Responses per forward pass when reference log-probs are computed."""
