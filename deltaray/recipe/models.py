"""The parts of a recipe that several sections share, and the models that answer or are trained.

Every class is one section: its keys, their types, defaults and meaning. Unknown keys are refused everywhere. What a
single value cannot tell (does the named teacher exist?) is checked in `check.py`; reading files and reporting lines is
`load.py`.
"""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from deltaray.limits import PART_BYTES, PATH_BYTES


def _day(value: Any) -> Any:
    """YAML reads a bare day as a date."""
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value)
        except ValueError:
            raise ValueError("a day is written as YYYY-MM-DD") from None
    return value.isoformat() if type(value) is date else value


def is_there(path: str) -> bool:
    """Whether a file or folder is there; one that cannot be looked at is not."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _place(value: str) -> str:
    """A path that a file system can have. `{seed}` becomes a number later on."""
    if not value.strip():
        raise ValueError("the path of a file or folder, or an id; it is empty")
    sizes = [len(part.encode()) for part in value.split("/")]
    if max(sizes) > PART_BYTES or sum(sizes) + len(sizes) > PATH_BYTES:
        raise ValueError(f"a shorter path: {PATH_BYTES:,} bytes at most, and {PART_BYTES} for each name in it")
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError("a path without `~`: there is no such user here") from None
    return value


Day = Annotated[str, BeforeValidator(_day)]
Place = Annotated[str, AfterValidator(_place)]
"""A folder or file, an id of the Hub, or an address."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""Of random numbers; every library takes these."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    stall_seconds: float = Field(600.0, gt=0)
    """A replica that does not end a step of its batch for so long is ended, and its units are repeated by another."""
    arguments: dict[str, Any] = {}
    """Further vLLM engine arguments, passed on as they are (`quantization`, `max_num_seqs`, …)."""


class Model(Section):
    model: Place
    """A folder or a Hugging Face id; `{seed}` is replaced by the study's seed (then one model per seed)."""
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: Place | None = None
    """A Jinja file that replaces the tokenizer's own chat template, or the name of one of its own where it has
    several (`default`, `tool_use`, `rag`)."""
    chat_template_arguments: dict[str, Any] = {}
    """What the template is rendered with besides the messages, such as `enable_thinking: false`."""
    date: Day | None = None
    """The day that the chat template takes for today (YYYY-MM-DD), where it asks; default: the study's `date`."""

    @property
    def is_local(self) -> bool:
        """A folder rather than a hub id, which is `name` or `owner/name`."""
        return is_there(self.model) or self.model.startswith(("/", ".", "~")) or self.model.count("/") > 1


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
    adapter: Place | None = None
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
    """Tokens of prompt and response together; a pair whose prompt leaves no room is dropped."""
    overlong: Literal["cut", "drop"] = "cut"
    """What to do with a pair whose response does not fit: cut it, its last token made the end token, or drop it."""
    quantize: Literal["nf4"] | None = None
    """Hold the frozen student in 4 bits (QLoRA, arXiv 2305.14314) while adapters are trained on it, and while it gives
    its references, which are then exact; needs `deltaray[qlora]`. Answers come from the student as it is stored."""
    engine: Engine = Engine()
