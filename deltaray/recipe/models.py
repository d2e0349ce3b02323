"""The recipe as typed models: every key a user may write, its type, its default and what it means.

Unknown keys are refused everywhere. What a single value cannot tell (does the named teacher exist?) is checked in
`check.py`; reading files and reporting lines is `load.py`.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
LossName = Literal["dpo_norm", "dpo", "sft"]
"""`dpo_norm`: length-normalised DPO (papers' default); `dpo`: summed; `sft`: imitate the chosen response."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(Section):
    path: str
    """JSONL, JSON, Parquet, CSV or a hub dataset id, with `prompt` (text) or `messages`, optionally `id`, `answer`,
    `source`."""
    limit: int | None = Field(None, ge=1)
    """Use the first so many rows only."""
    duplicates: Literal["refuse", "drop"] = "refuse"
    """What to do with a second row of the same id or text: hub data sets often repeat prompts."""


class Sampling(Section):
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0: no limit."""
    max_tokens: int = Field(2048, ge=1)
    stop: list[str] = []
    samples: int = Field(1, ge=1)
    """Responses per prompt; asking for more later generates only those that are missing."""
    seed: int | None = 0
    """With the prompt's id and the sample's index it seeds each response, so that a rerun reproduces it; null leaves
    sampling unseeded, a little faster on GPUs."""


class Engine(Section):
    """The vLLM replicas that serve one model. Without GPUs vLLM runs on the CPU."""

    gpus: float | None = Field(None, ge=0)
    """GPUs per replica; default: tensor_parallel x pipeline_parallel if the cluster has GPUs, else 0. A fraction
    shares a GPU between replicas; more than one is a whole number."""
    cpus: float = Field(1.0, gt=0)
    """Logical CPUs per replica."""
    replicas: int = Field(1, ge=1)
    """Replicas to start with; the pool grows to `max_replicas` while there is work."""
    max_replicas: int | None = Field(None, ge=1)
    accelerator: str | None = None
    """Ray's accelerator type (`H100`, `L4`, …) of the nodes that the replicas may run on."""
    dtype: str = "auto"
    max_model_len: int | None = Field(None, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    pipeline_parallel: int = Field(1, ge=1)
    units_in_flight: int | None = Field(None, ge=1)
    """Units that one replica works on at once; default: enough to keep its batch full."""
    arguments: dict[str, Any] = {}
    """Further vLLM engine arguments, passed on as they are (`quantization`, `max_num_seqs`, …)."""


class Model(Section):
    model: str
    """A folder or a Hugging Face id; `{seed}` is replaced by the study's seed (then one model per seed)."""
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's own chat template."""
    chat_template_arguments: dict[str, Any] = {}
    """What the template is rendered with besides the messages, such as `enable_thinking: false`."""

    @property
    def is_local(self) -> bool:
        """A folder rather than a hub id, which is `name` or `owner/name`."""
        return Path(self.model).exists() or self.model.startswith(("/", ".", "~")) or self.model.count("/") > 1


class Endpoint(Section):
    """A server that speaks OpenAI's chat completions and is a teacher instead of vLLM replicas of our own."""

    url: str
    """Its base, such as `https://host/v1`."""
    key_variable: str | None = None
    """The environment variable that holds the key; keys themselves stand in no recipe."""
    in_flight: int = Field(64, ge=1)
    """Requests at once."""
    requests_per_minute: float | None = Field(None, gt=0)
    retries: int = Field(8, ge=0)
    """How often a request is repeated after a rate limit, a time-out or a server's error, with growing pauses."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that one request may take."""
    body: dict[str, Any] = {}
    """Further fields of every request, passed on as they are."""


class Teacher(Model):
    sampling: Sampling = Sampling()
    engine: Engine = Engine()
    system: str | None = None
    """A system prompt for prompts that bring none."""
    adapter: str | None = None
    """A folder with a PEFT LoRA adapter of `model`; vLLM serves it on top."""
    reasoning: str | None = None
    """For thinking models: vLLM's reasoning parser (`qwen3`, `deepseek_r1`, …) that tells the reasoning from the
    answer; the answer alone is the response's text."""
    endpoint: Endpoint | None = None
    """Ask this server for `model` instead of starting vLLM."""


class Student(Model):
    name: str = "student"
    """How the untouched student is called in the evaluation."""
    max_length: int = Field(2048, ge=4)
    """Tokens of prompt and response together; longer responses are cut, prompts that leave no room are dropped."""
    engine: Engine = Engine()


class Scorer(Section):
    kind: Literal["exact_match"]
    """`exact_match`: 1.0 where the response equals the prompt's `answer` (white space stripped), else 0.0."""


class Pairing(Section):
    chosen: str
    rejected: str
    """Teachers by name. Both give one response per prompt and sample; the pairing joins them."""
    scorer: str | None = None
    """Whose scores fill the score and delta columns."""
    keep: Literal["all", "chosen_wrong", "chosen_right"] = "all"
    """Keep only pairs whose chosen response the scorer calls wrong (score 0) or right (score 1)."""
    min_delta: float | None = None
    max_delta: float | None = None
    drop_identical: bool = True
    drop_truncated: bool = True
    """Drop pairs in which a response was cut at max_tokens."""
    max_length_gap: int | None = Field(None, ge=0)
    """Largest allowed difference of the two lengths, in the student's tokens."""
    limit: int | None = Field(None, ge=1)
    """Keep a seeded draw of so many pairs."""


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


class Task(Section):
    path: str
    """Prompts with an `answer`, in any form that `prompts.path` may have."""
    metric: Literal["exact_match"] = "exact_match"
    limit: int | None = Field(None, ge=1)
    sampling: Sampling = Sampling()


class Evaluation(Section):
    tasks: dict[str, Task]
    selection: dict[str, Task] = {}
    """Tasks on which the best of a grid is chosen; they share no prompt with `tasks`."""
    teachers: bool = True
    """Evaluate the teachers of the pairings, too."""
    claims: list[str] = []
    """`better > worse`, each checked on the mean of the tasks and reported with its interval."""


class Miniature(Section):
    """Makes the toy family of models, its prompts and its evaluation before anything else (once; then cached)."""

    directory: str = "runs/miniature-family"


class Failures(Section):
    """When a generation that goes plainly wrong is stopped."""

    max_share: float = Field(0.2, ge=0, le=1)
    """Largest tolerated share of a teacher's rows that fail (prompt too long, empty answer, engine error)."""
    after: int = Field(256, ge=1)
    """Rows of a teacher before the share counts."""


class Cluster(Section):
    address: str | None = None
    """Of a running Ray cluster (`auto`, `host:port`, `ray://…`); none: Ray is started on this machine."""
    cpus: int | None = Field(None, ge=1)
    """Logical CPUs of the Ray that is started here; default: the machine's, at least 8 (workers mostly wait)."""
    gpus: int | None = Field(None, ge=0)
    dashboard: bool = False
    gpu_hour_price: float | None = Field(None, ge=0)
    """For estimates of cost, in any currency."""


class Recipe(Section):
    name: str = Name
    out: str
    seeds: list[int] = Field([0], min_length=1)
    shard_size: int = Field(32768, ge=1)
    """Prompts per shard: every table has one file per shard (about 150 MiB of ordinary answers)."""
    unit_size: int = Field(256, ge=1)
    """Prompts per unit of generation: what is committed at once, and the most that one crash costs per unit in
    flight."""
    failures: Failures = Failures()
    prompts: Prompts
    teachers: dict[str, Teacher] = Field(min_length=1)
    scorers: dict[str, Scorer] = {}
    pairings: dict[str, Pairing] = {}
    student: Student | None = None
    training: Training | None = None
    evaluation: Evaluation | None = None
    miniature: Miniature | None = None
    cluster: Cluster = Cluster()

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("every seed once")
        return value
