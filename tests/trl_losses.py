"""TRL 1.16's own loss code, fed with log-probabilities or a tiny model instead of a trainer's data set.

Its methods run on objects that carry only the attributes they read; no formula is typed again here.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from deltaray.train.losses import Side

DPO_TYPES = {
    "dpo_norm": "sigmoid_norm",
    "dpo": "sigmoid",
    "robust": "robust",
    "ipo": "ipo",
    "hinge": "hinge",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "sft": "sft",
}
"""TRL's names of the losses of its DPOTrainer."""


@dataclass(frozen=True)
class Rows:
    """2B conversations, all chosen above all rejected; log-probabilities are 0 where `mask` is."""

    logps: Tensor  # [2B, T], of the predicted tokens
    mask: Tensor  # bool [2B, T]
    reference: Tensor  # [2B]

    @property
    def tokens(self) -> Tensor:
        return self.mask.sum(dim=1)


def random_rows(seed: int, pairs: int = 8, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Rows:
    """Prompts of 1 to 5 tokens, responses of 1 to 20."""
    chance = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 5, (pairs,), generator=chance).repeat(2)[:, None]
    lengths = torch.randint(1, 21, (2 * pairs, 1), generator=chance)
    positions = torch.arange(25)[None]
    mask = (positions >= starts) & (positions < starts + lengths)
    logps = -scale * torch.empty(2 * pairs, 25).exponential_(generator=chance).to(dtype) * mask
    drift = torch.randn(2 * pairs, generator=chance).to(dtype) * scale
    reference = logps.sum(dim=1) + drift * lengths.squeeze(1) ** 0.5
    return Rows(logps.requires_grad_(), mask, reference)


def _light(kind: type, **attributes: Any) -> Any:
    """An object of a trainer's class with its methods and these attributes only."""
    trainer = object.__new__(kind)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    common = {
        "accelerator": accelerator, "aux_loss_enabled": False, "_metrics": defaultdict(lambda: defaultdict(list)),
        "model": SimpleNamespace(training=True), "_total_train_tokens": 0, "_tp_size": 1, "is_encoder_decoder": False,
    }  # fmt: skip
    trainer.__dict__.update(common | attributes)
    return trainer


def _answers(logps: Tensor) -> SimpleNamespace:
    """What TRL's patched model returns, from the log-probabilities alone."""
    other = torch.zeros_like(logps.detach())
    return SimpleNamespace(
        log_probs=logps, entropy=other, mean_logits=other, is_top1=other.bool(), log_sum_sq_probs=other
    )


def _inputs(rows: Rows) -> dict[str, Tensor]:
    """TRL's masks stand over the tokens themselves, one position to the right of what predicts them."""
    mask = torch.nn.functional.pad(rows.mask.long(), (1, 0))
    return {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def dpo_trainer_loss(
    rows: Rows, types: list[str], beta: float, smoothing: float = 0.0, weights: list[float] | None = None
) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics) of DPOTrainer."""
    trainer = _light(
        DPOTrainer, loss_types=types, loss_weights=weights or [1.0] * len(types), beta=beta, ld_alpha=None,
        label_smoothing=smoothing, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
    )  # fmt: skip
    chosen, rejected = rows.reference.chunk(2)
    inputs = _inputs(rows) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trainer._compute_loss(lambda **_: _answers(rows.logps), inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def kto_trainer_loss(
    rows: Rows, labels: Tensor, mismatched: Rows, beta: float, desirable: float, undesirable: float
) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics) of KTOTrainer; `mismatched` are the conversations of its KL term."""
    trainer = _light(
        KTOTrainer, loss_type="kto", calculate_KL=True, beta=beta, desirable_weight=desirable,
        undesirable_weight=undesirable, precompute_ref_logps=True,
    )  # fmt: skip
    inputs = _inputs(rows) | {f"KL_{name}": value for name, value in _inputs(mismatched).items()}
    inputs |= {"label": labels, "ref_logps": rows.reference, "ref_KL_logps": mismatched.reference}

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return _answers((mismatched if input_ids is inputs["KL_input_ids"] else rows).logps)

    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def cpo_trainer(loss_type: str, beta: float, smoothing: float = 0.0, gamma: float = 0.0, alpha: float = 0.0) -> Any:
    return _light(
        CPOTrainer, loss_type=loss_type, beta=beta, label_smoothing=smoothing, simpo_gamma=gamma, cpo_alpha=alpha,
        alpha=0.0, pad_token_id=0,
    )  # fmt: skip


def orpo_trainer(beta: float) -> Any:
    return _light(ORPOTrainer, beta=beta, padding_value=0)


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """(prompt ids, response ids) as rows padded on the right, with masks of the whole and of the response."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    fill = [width - len(prompt) - len(response) for prompt, response in rows]
    parts = [(len(prompt), len(response), n) for (prompt, response), n in zip(rows, fill, strict=True)]
    return {
        "input_ids": torch.tensor([p + r + [0] * n for (p, r), n in zip(rows, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * (p + r) + [0] * n for p, r, n in parts]),
        "response_mask": torch.tensor([[False] * p + [True] * r + [False] * n for p, r, n in parts]),
    }


def split_sides(logp: Tensor, tokens: Tensor, reference: Tensor, both: bool) -> tuple[Side, Side | None]:
    """(chosen, rejected) of tensors that stack all chosen above all rejected rows."""
    if not both:
        return Side(logp, tokens, reference), None
    halves = [torch.chunk(tensor, 2) for tensor in (logp, tokens, reference)]
    return Side(*(half[0] for half in halves)), Side(*(half[1] for half in halves))


def cpo_batch(prompts: list[list[int]], chosen: list[list[int]], rejected: list[list[int]]) -> dict[str, Tensor]:
    """The batch that CPOTrainer and ORPOTrainer take."""
    batch = {}
    for name, responses in (("chosen", chosen), ("rejected", rejected)):
        rows = [(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        fill = [width - len(prompt) - len(response) for prompt, response in rows]
        parts = list(zip(rows, fill, strict=True))
        batch[f"{name}_input_ids"] = torch.tensor([p + r + [0] * n for (p, r), n in parts])
        batch[f"{name}_attention_mask"] = torch.tensor([[1] * len(p + r) + [0] * n for (p, r), n in parts])
        batch[f"{name}_labels"] = torch.tensor([[-100] * len(p) + r + [-100] * n for (p, r), n in parts])
    return batch
