"""LoRA adapters for the tests of merging: random factors, and folders that PEFT itself has saved."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_model import make_model

from deltaray.merge.arguments import Merge
from deltaray.merge.factors import Factors
from deltaray.merge.methods import Options
from deltaray.merge.run import merge_adapters


def random_factors(rows: int = 48, columns: int = 40, rank: int = 6, seed: int = 0) -> Factors:
    die = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=die), torch.randn(rank, columns, generator=die)
    return Factors(left.double(), right.double())


def related(count: int, noise: float, rank: int = 6, rows: int = 96, columns: int = 64) -> list[Factors]:
    """Updates with common factors plus noise times factors of their own."""
    base = random_factors(rows, columns, rank, 99)
    own = [random_factors(rows, columns, rank, seed) for seed in range(count)]
    return [Factors(base.left + noise * each.left, base.right + noise * each.right) for each in own]


def regauged(update: Factors, seed: int = 5) -> Factors:
    """The same update from other factors: B G and G^-1 A."""
    gauge = torch.randn(update.rank, update.rank, generator=torch.Generator().manual_seed(seed)).double()
    return Factors(update.left @ gauge, torch.linalg.solve(gauge, update.right))


def make_adapter(folder: Path, seed: int = 0, tied: bool = False, **settings: Any) -> Path:
    """Saves an adapter of the tiny Llama whose factors are all random; `settings` are LoraConfig's."""
    model = make_model(tied=tied)
    asked = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asked))
    wrapped.peft_config["default"].base_model_name_or_path = "tiny"
    die = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=die))
    wrapped.save_pretrained(folder)
    return folder


def dense_updates(folder: Path, tied: bool = False) -> dict[str, torch.Tensor]:
    """What PEFT itself makes of an adapter: the change of every weight that it changes, in float64."""
    model = make_model(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, folder).double().merge_and_unload().state_dict()
    changes = {name: after[name].double() - before[name].double() for name in before}
    return {name: change for name, change in changes.items() if change.any()}


def merge(
    adapters: list[Path], out: Path, method: str = "gam", reference: str | None = None, base: str | None = None,
    dtype: str | None = None, into_base: bool = False, **options: Any,
) -> Any:  # fmt: skip
    return merge_adapters(Merge(adapters, method, Options(**options), reference, base, dtype, into_base), out)


def configure(folder: Path, **values: Any) -> None:
    """Changes keys of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
