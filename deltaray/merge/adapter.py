"""Reading a PEFT LoRA adapter's folder: its update of each weight matrix, or why it cannot be merged.

Only what is understood whole is read. DoRA, biases, fully trained modules and the like are refused: a merge that left
them out would look right and be wrong.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from deltaray.errors import UserError, door
from deltaray.files import read_settings
from deltaray.merge.factors import Factors
from deltaray.model_files.headers import tensors_of_file
from deltaray.model_files.lora import BASE_COPY, CONFIG, LORA, PATTERNS, PREFIX, WEIGHTS, pattern_values

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales whole columns of the base; train with use_dora=False",
    "lora_bias": "biases are not part of a product B A; train with lora_bias=False",
    "modules_to_save": "fully trained modules are not LoRA; give them LoRA through target_modules instead",
    "trainable_token_indices": "trained token embeddings are not LoRA; train without them",
    "target_parameters": "LoRA on parameters (fused experts) is not one product per matrix; train with the attention's "
    "layers as targets (target_modules: [q_proj, k_proj, v_proj, o_proj])",
    "layer_replication": "replicated layers share weights of the base; train without layer_replication",
    "alora_invocation_tokens": "an activated LoRA depends on the prompt; train without it",
    "use_qalora": "QALoRA pools its inputs; train with use_qalora=False",
    "use_bdlora": "block-diagonal LoRA is not one product per matrix; train without it",
    "arrow_config": "Arrow routes between adapters at run time; merge the routed adapters themselves",
    "kasa_config": "KaSA has singular values of its own; train without it",
    "monteclora_config": "MonteCLoRA samples its weights; train without it",
    "ensure_weight_tying": "tied adapters share their factors; train with ensure_weight_tying=False",
    "megatron_config": "Megatron's layers split their weights; convert the adapter to ordinary PEFT",
}
"""Keys of adapter_config.json which, when set, make an adapter more than products B A; and the fix."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
"""Values of init_lora_weights that leave the base as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change it."""


@dataclass(frozen=True)
class Keys:
    """The two tensors of one module. embedding: PEFT's names and shapes of an embedding's LoRA."""

    module: str
    embedding: bool

    @property
    def down(self) -> str:
        """A, [r, k]."""
        return f"{PREFIX}{self.module}." + ("lora_embedding_A" if self.embedding else "lora_A.weight")

    @property
    def up(self) -> str:
        """B, [d, r]."""
        return f"{PREFIX}{self.module}." + ("lora_embedding_B" if self.embedding else "lora_B.weight")


class Adapter:
    """One adapter's folder; tensors are read when they are asked for.

    Raises:
        UserError: it is not a LoRA adapter in safetensors, or one that is more than products B A.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self._file = _open_weights(folder)
        self.modules, self.base_copies = _modules(folder / WEIGHTS, list(self._file.keys()))
        self._ranks, self._alphas = (pattern_values(folder, self.config, key, self.modules) for key in PATTERNS)
        self.shapes = {keys.module: self._shape(keys) for keys in self.modules.values()}
        self.dtype = self._widest()

    @cached_property
    def base(self) -> str | None:
        """What the adapter says it was trained on."""
        found = self.config.get("base_model_name_or_path")
        return str(found) if found else None

    def scaling(self, module: str) -> float:
        """alpha / r of a module, or alpha / sqrt(r) for rsLoRA, patterns included."""
        rank = self._ranks.get(module, self.config["r"])
        alpha = self._alphas.get(module, self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def factors(self, module: str) -> Factors | None:
        """A module's update in float64; None where the adapter has none.

        Raises:
            UserError: a number in it is not finite.
        """
        if module not in self.modules:
            return None
        keys = self.modules[module]
        return Factors(self._read(keys.up) * self.scaling(module), self._read(keys.down))

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key)

    def _read(self, key: str) -> torch.Tensor:
        tensor = self.tensor(key).double()
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{self.folder / WEIGHTS}: {key}: {count:,} of {tensor.numel():,} numbers are NaN or infinite; "
                "its training has diverged: train it again or leave it out"
            )
        return tensor

    def _shape(self, keys: Keys) -> tuple[int, int]:
        """[d, k] of the update; the stored rank must be the configuration's."""
        down, up = (self._file.get_slice(key).get_shape() for key in (keys.down, keys.up))
        where = f"{self.folder / WEIGHTS}: {keys.down}"
        if len(down) != 2 or len(up) != 2:
            raise UserError(
                f"{where}: shapes {down} and {up} are not matrices; only linear layers and embeddings merge"
            )
        rank = self._ranks.get(keys.module, self.config["r"])
        if (down[0], up[1]) != (rank, rank):
            raise UserError(f"{where}: rank {down[0]} here, {up[1]} in B and {rank} in {CONFIG} must be the same")
        return up[0], down[1]

    def _widest(self) -> torch.dtype:
        """The dtype that holds every tensor of the adapter."""
        keys = [key for pair in self.modules.values() for key in (pair.up, pair.down)]
        names = {str(self._file.get_slice(key).get_dtype()) for key in keys}
        if unknown := sorted(names - DTYPES.keys()):
            raise UserError(f"{self.folder / WEIGHTS}: holds {', '.join(unknown)}; save it in {', '.join(DTYPES)}")
        return widest(DTYPES[name] for name in names)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds the numbers of all of these."""
    return reduce(torch.promote_types, dtypes)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = read_settings(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{folder}: holds no {CONFIG}; give the folder of an adapter that PEFT has saved") from None
        if isinstance(error.__cause__, NotADirectoryError):
            raise UserError(f"{folder}: is a file; give the folder of an adapter that PEFT has saved") from None
        raise
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')}; only LORA adapters can be merged")
    _refuse_more_than_lora(path, config)
    return config


def _refuse_more_than_lora(path: Path, config: Mapping[str, Any]) -> None:
    for key, fix in REFUSED.items():
        if config.get(key):
            raise UserError(f"{path}: {key}: cannot be merged: {fix}")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias: cannot be merged: trained biases are not LoRA; train with bias='none'")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights: {start} has changed the base; convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    _refuse_numbers(path, config)


def _refuse_numbers(path: Path, config: Mapping[str, Any]) -> None:
    for key in PATTERNS:
        _refuse_pattern(f"{path}: {key}", config.get(key) or {})
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        raise UserError(f"{path}: r and rank_pattern must be positive integers, not {ranks}")
    alphas = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas):
        raise UserError(f"{path}: lora_alpha and alpha_pattern must be finite numbers, not {alphas}")


def _refuse_pattern(where: str, pattern: Any) -> None:
    if not isinstance(pattern, dict):
        raise UserError(f"{where}: gives numbers by the modules' names, such as {{q_proj: 8}}, not {pattern}")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"{where}: {key}: is not a regular expression: {error}") from None


def _open_weights(folder: Path) -> Any:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        if pickled:
            raise UserError(
                f"{folder / pickled[0]}: pickled files can run code and are not read; load the adapter with PEFT where "
                "you trust it and save it again (save_pretrained writes safetensors)"
            )
        raise UserError(f"{folder}: holds no {WEIGHTS}; give the folder of an adapter that PEFT has saved")
    tensors_of_file(path)  # whole, and nothing in it is empty
    with door(str(path), "is damaged; fetch or save it again"):
        return safe_open(path, framework="pt")


def _modules(path: Path, keys: list[str]) -> tuple[dict[str, Keys], list[str]]:
    """The LoRA modules by name without PEFT's prefix, and keys of saved base embeddings."""
    sides: dict[Keys, set[str]] = {}
    copies = []
    for key in keys:
        found = LORA.fullmatch(key)
        if found and key.startswith(PREFIX):
            name = Keys(found["module"].removeprefix(PREFIX), found["embedding"] is not None)
            sides.setdefault(name, set()).add(found["side"] or found["embedding"])
        elif BASE_COPY.fullmatch(key):
            copies.append(key)
        else:
            raise UserError(
                f"{path}: {key}: is not a LoRA of a PEFT model; save the adapter with PEFT, with LoRA alone"
            )
    for name, there in sides.items():
        if there != {"A", "B"}:
            lacking = name.down if "A" not in there else name.up
            raise UserError(f"{path}: {lacking} is missing; save the adapter again")
    if not sides:
        raise UserError(f"{path}: holds no LoRA tensor; save the adapter again")
    return {name.module: name for name in sides}, copies
