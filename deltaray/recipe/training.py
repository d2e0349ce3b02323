"""The recipe's training section: the students to train, and how the work is laid out."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from deltaray.recipe.losses import LOSS_FACTS, SETTINGS, LossName
from deltaray.recipe.models import Place, Section, Seed
from deltaray.recipe.watch import Watch


class Lora(Section):
    """Train a LoRA adapter on the frozen student instead of all its weights (arXiv 2106.09685), through PEFT."""

    rank: int = Field(64, ge=1)
    alpha: float = Field(128, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    """Names of the layers that get an adapter; `all-linear`: every linear layer but the output layer; in a mixture of
    experts those outside the blocks of experts."""


class Run(Section):
    """One student to train."""

    pairing: str | list[str]
    """A list: all their pairs together, one that several of them hold once."""
    after: str | None = None
    """Go on from what this run has trained, its adapter or all its weights, instead of from the untouched student. A
    loss that compares with a reference still takes the untouched student's log-probs."""
    pairs: int | None = Field(None, ge=1)
    """Train on a seeded draw of so many pairs; a larger draw holds all pairs of a smaller one."""
    lora: Lora | None = None
    """Train an adapter (`adapters/<name>/`); default: all weights (`students/<name>/`)."""
    loss: LossName = "dpo_norm"
    """`dpo_norm`: length-normalised DPO (the papers' default); `dpo`: on sums; `sft`: imitate the chosen response. The
    others, their formulas and papers: `deltaray/train/formulas.py`."""
    # The next six belong to the loss: null takes its own default (`deltaray/recipe/losses.py`); what a loss does not
    # read is refused.
    beta: float | None = Field(None, gt=0)
    """How closely the student is held to the reference. On sums about 0.1, on means (dpo_norm, simpo) 2 to 10."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """The share of pairs thought to be labelled the wrong way round."""
    simpo_gamma: float | None = Field(None, ge=0)
    """By how much the chosen response's reward should exceed the rejected one's."""
    nll_weight: float | None = Field(None, ge=0)
    """Weight of an added term: the chosen responses' negative log-likelihood, a mean over all their tokens."""
    desirable_weight: float | None = Field(None, ge=0)
    """Weight of the chosen responses' losses in kto."""
    undesirable_weight: float | None = Field(None, ge=0)
    """Weight of the rejected responses' losses in kto."""
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
    intermediate_checkpoints: list[int] = []
    """After each of these steps the student is also kept as one of its own, `<run>-step<k>`, and evaluated."""
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: Seed = 0
    """Seeds the order of the pairs (the study's seed is added)."""

    @property
    def pairings(self) -> list[str]:
        """The pairings by name."""
        return self.pairing if isinstance(self.pairing, list) else [self.pairing]

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, data: Any) -> Any:
        """Writes them out, so that what is planned, locked and reported has the numbers in it."""
        loss = data.get("loss", "dpo_norm") if isinstance(data, dict) else None
        if not isinstance(loss, str) or loss not in LOSS_FACTS:
            return data
        given = {key: value for key, value in data.items() if value is not None or key not in SETTINGS}
        return {**LOSS_FACTS[loss].defaults, **given}

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | list[float]) -> float | list[float]:
        rates = value if isinstance(value, list) else [value]
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise ValueError("one positive number, or a list of different positive numbers (a grid)")
        return value

    @field_validator("intermediate_checkpoints")
    @classmethod
    def _different_steps(cls, value: list[int]) -> list[int]:
        if min(value, default=1) < 1 or len(set(value)) < len(value):
            raise ValueError("different steps, counted from 1")
        return sorted(value)


class Generation(Section):
    """Greedy answers of the student to held-out prompts, while it is trained: after step 1 and with every held-out
    evaluation."""

    prompts: int = Field(32, ge=1)
    """How many; fewer if there are fewer held-out prompts."""
    max_tokens: int = Field(256, ge=1)
    """Longer answers are cut."""
    scorer: str | None = None
    """One of `scorers:`, if the answers are to be scored: a verifier or a surface statistic."""


class Training(Section):
    runs: dict[str, Run] = {}
    """None where an `exploration` alone says what is trained."""
    workers: int = Field(1, ge=1)
    """Data-parallel workers (processes), each with `gpus_per_worker` GPUs."""
    groups: int = Field(1, ge=1)
    """Groups of so many workers that train different runs side by side, as far as the cluster has room for them."""
    gpus_per_worker: int | None = Field(None, ge=0, le=1)
    """Default: 1 if the cluster has GPUs, else 0. A worker uses one GPU; more GPUs are more `workers`."""
    cpus_per_worker: float = Field(1.0, gt=0)
    accelerator: str | None = None
    """Ray's accelerator type (`H100`, …) of the nodes that the workers may run on."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """0 runs as 1: DeepSpeed's stage 0 tells no gradient norm and saves no memory over it."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    micro_batch_tokens: int = Field(8192, ge=1)
    """Tokens per worker and forward pass, which decides what a GPU must hold; passes are accumulated up to a run's
    `batch_size`. A pair counts its prompt once; one that alone is longer goes alone."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more work."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the machine's memory instead of the GPU's: the optimizer's state; with ZeRO 3 also weights."""
    offload_folder: Place | None = None
    """A folder on a fast local disk (NVMe) of every worker's machine where the optimizer's state waits instead (ZeRO 3;
    arXiv 2104.07857); one per study. DeepSpeed compiles its disk access at first use: that needs libaio and a C++
    compiler."""
    heldout: float = Field(0.0, ge=0, lt=1)
    """Share of the prompts that no run trains on; loss and accuracy on their pairs are measured while training."""
    heldout_evaluations: int = Field(10, ge=1)
    """How often in a run."""
    generation: Generation | None = None
    """Also let the student answer held-out prompts then; needs `heldout`."""
    checkpoint_minutes: float = Field(15.0, gt=0)
    """Minutes between two checkpoints: what a crash costs at most."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Also a checkpoint every so many steps."""
    max_failures: int = Field(8, ge=0)
    """How often a run is resumed by itself after a worker or a node has died."""
    watch: Watch = Watch()
    """When a run looks like failing, and whether it is then stopped."""
