"""A fresh LoRA adapter on a student, and which of its layers get one."""

from typing import Any

from torch import nn

from deltaray.errors import UserError
from deltaray.model_files.adapters import fill_adapter
from deltaray.model_files.lora import MATCH_SECONDS
from deltaray.recipe.training import Lora
from deltaray.train.experts import expert_blocks
from deltaray.untrusted import OverLimitError, RaisedError, limited

ALL = "all-linear"


def with_adapter(model: Any, lora: Lora, start: str | None = None) -> Any:
    """
    Args:
        start: a folder with an adapter to go on from.

    Raises:
        UserError: the targets name no layer, or experts.
        StageError: the adapter to go on from does not fit.
    """
    from peft import LoraConfig, get_peft_model

    targets = targets_of(model, lora)
    if isinstance(targets, str) and targets != ALL:
        _refuse_slow(targets, model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"lora.targets: {str(error).splitlines()[0]}") from None
    if parameters := adapted.peft_config["default"].target_parameters:
        raise UserError(_experts_hit(lora, sorted(parameters)))
    if start is not None:
        fill_adapter(adapted, start)
    return adapted


def _refuse_slow(targets: str, model: nn.Module) -> None:
    """PEFT matches one text as a regular expression with the names of all modules, without a limit."""
    names = [name for name, _ in model.named_modules()]
    try:
        limited("deltaray.untrusted.patterns", MATCH_SECONDS).call("full_matches", targets, names)
    except (OverLimitError, RaisedError) as error:
        raise UserError(
            f"lora.targets: {targets!r} cannot be matched with the names of the layers: {error}; write a list of their "
            "last parts, such as [q_proj, v_proj]"
        ) from None


def targets_of(model: nn.Module, lora: Lora) -> str | list[str]:
    """What PEFT gets: of a mixture of experts, by default, the linear layers outside the blocks of experts.

    Experts are one tensor for all of them, or so many layers that each sees a few tokens; vLLM and `deltaray merge`
    take no adapters of such tensors.

    Raises:
        UserError: targets that are named reach into experts.
    """
    blocks = expert_blocks(model)
    if not blocks:
        return lora.targets
    inside: set[str] = set()
    outside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            within = any(name.startswith(f"{block}.") for block in blocks)
            (inside if within else outside).add(name.rpartition(".")[2])
    if lora.targets == ALL:
        last = _last_name(model)
        return sorted(outside - inside - {last}) or lora.targets
    if isinstance(lora.targets, list) and (hit := sorted(_parameters_named(model, blocks) & set(lora.targets))):
        raise UserError(_experts_hit(lora, hit))
    return lora.targets


def _last_name(model: Any) -> str:
    layer = model.get_output_embeddings()
    return next((name.rpartition(".")[2] for name, module in model.named_modules() if module is layer), "")


def _parameters_named(model: nn.Module, blocks: list[str]) -> set[str]:
    """Last names of the tensors of all experts, and `experts` itself."""
    names = {"experts"}
    for name, weight in model.named_parameters():
        shape = getattr(weight, "ds_shape", weight.shape)
        if len(shape) == 3 and any(name.startswith(f"{block}.") for block in blocks):
            names.add(name.rpartition(".")[2])
    return names


def _experts_hit(lora: Lora, names: list[str]) -> str:
    return (
        f"lora.targets: {lora.targets}: an adapter would reach into the experts ({', '.join(names)}), and neither vLLM "
        "nor `deltaray merge` takes one; leave targets out (the linear layers outside the experts) or name such layers"
    )
