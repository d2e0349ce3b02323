"""Every loss, its gradient and its rewards are those of TRL 1.16's own code; and what must hold of a loss by itself."""

import math
from dataclasses import replace

import pytest
import torch
from pair_examples import examples, gradients, loss_of, with_references
from tiny_model import make_model
from trl.trainer.utils import add_fused_lm_head
from trl_losses import (
    DPO_TYPES,
    Rows,
    cpo_batch,
    cpo_trainer,
    dpo_trainer_loss,
    kto_trainer_loss,
    orpo_trainer,
    padded,
    random_rows,
    split_sides,
)

from deltaray.recipe.losses import LOSS_FACTS
from deltaray.recipe.training import Run
from deltaray.train.attention import PACKED
from deltaray.train.formulas import LossSettings
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.losses import LOSSES, Divisors, Side, contribution, divisors, kl_estimate

BETAS = (0.05, 0.1, 1.0, 5.0)
EXACT = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 1e-6}}
"""Float64 shows that the formula is the same one; float32 is what training computes in."""


def settings_of(name, **more):
    return LossSettings.of(Run(pairing="p", loss=name, **more))


def our_loss(name, rows, settings, kl=None, part=None, weights=None):
    """(what the rows of `part` add to the loss of the batch, per-pair values)."""
    loss, pairs = LOSSES[name], rows.mask.shape[0] // 2
    part = torch.arange(pairs) if part is None else part
    both = torch.cat([part, part + pairs]) if loss.needs_rejected else part
    reference = rows.reference if loss.needs_reference else torch.zeros_like(rows.reference)
    sides = split_sides(rows.logps.sum(dim=1)[both], rows.tokens[both], reference[both], loss.needs_rejected)
    values = loss(*sides, settings, kl)
    whole = divisors(loss, rows.tokens[:pairs].tolist(), rows.tokens[pairs:].tolist())
    return contribution(values, torch.ones(len(part)) if weights is None else weights, whole), values


def assert_same(ours, theirs, rows, tolerance):
    """Values, and gradients to every response token's log-probability."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    found = [torch.autograd.grad(loss, rows.logps)[0] * rows.mask for loss in (ours, theirs)]
    assert found[1].abs().sum() > 0
    torch.testing.assert_close(*found, **tolerance)


# --- DPOTrainer -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", list(EXACT))
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", list(DPO_TYPES))
def test_values_and_gradients_are_those_of_dpo_trainer(name, beta, dtype):
    for seed in range(3):
        rows = random_rows(seed, dtype=dtype)
        more = {} if name == "sft" else {"beta": beta}
        if name == "robust":
            more["label_smoothing"] = 0.1 * (seed + 1)
        settings = settings_of(name, **more)
        theirs, metrics = dpo_trainer_loss(rows, [DPO_TYPES[name]], beta, settings.label_smoothing)
        ours, values = our_loss(name, rows, settings)
        assert_same(ours, theirs, rows, EXACT[dtype])
        if LOSSES[name].score == "sum" and name != "sft":
            assert values.rewards_chosen.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-5)
            assert values.rewards_rejected.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=1e-5)
            accuracy = (values.rewards_chosen > values.rewards_rejected).double().mean().item()
            assert accuracy == pytest.approx(metrics["rewards/accuracies"])


@pytest.mark.parametrize("smoothing", [0.01, 0.2, 0.4])
@pytest.mark.parametrize("name", ["dpo", "dpo_norm"])
def test_label_smoothing_is_that_of_trl(name, smoothing):
    """TRL's `aot` sorts a batch and smooths: of one pair it is conservative DPO. Its CPOTrainer smooths means, too."""
    rows = random_rows(1, pairs=1)
    ours, _ = our_loss(name, rows, settings_of(name, beta=0.7, label_smoothing=smoothing))
    if name == "dpo":
        theirs, _ = dpo_trainer_loss(rows, ["aot"], 0.7, smoothing)
    else:
        ratios = (rows.logps.sum(dim=1) - rows.reference) / rows.tokens
        theirs = cpo_trainer("simpo", 0.7, smoothing).cpo_loss(*ratios.chunk(2))[0].mean()
    assert_same(ours, theirs, rows, EXACT[torch.float64])


@pytest.mark.parametrize("name", [name for name in DPO_TYPES if name != "sft"])
def test_the_nll_term_is_that_of_dpo_trainers_loss_mix(name):
    rows, smoothing = random_rows(4), LOSS_FACTS[name].defaults.get("label_smoothing", 0.0)
    theirs, _ = dpo_trainer_loss(rows, [DPO_TYPES[name], "sft"], 0.5, smoothing, weights=[1.0, 0.3])
    ours, _ = our_loss(name, rows, settings_of(name, beta=0.5, nll_weight=0.3))
    assert_same(ours, theirs, rows, EXACT[torch.float64])


# --- KTOTrainer -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", list(EXACT))
@pytest.mark.parametrize(("beta", "desirable", "undesirable"), [(0.1, 1.0, 1.0), (0.5, 1.3, 0.7), (2.0, 0.5, 2.0)])
def test_kto_is_that_of_kto_trainer(beta, desirable, undesirable, dtype):
    points = []
    for seed in range(6):
        rows, mismatched = random_rows(seed, dtype=dtype), random_rows(seed + 100, dtype=dtype)
        labels = torch.arange(16) < 8
        theirs, metrics = kto_trainer_loss(rows, labels, mismatched, beta, desirable, undesirable)
        kl = kl_estimate((mismatched.logps.sum(dim=1) - mismatched.reference).sum(), 16)
        weights = {"desirable_weight": desirable, "undesirable_weight": undesirable}
        ours, values = our_loss("kto", rows, settings_of("kto", beta=beta, **weights), kl)
        assert_same(ours, theirs, rows, EXACT[dtype])
        assert values.rewards_chosen.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-5)
        assert values.rewards_rejected.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=1e-5)
        points.append(kl.item())
    assert min(points) == 0 < max(points)  # both sides of the cut at 0


def test_kto_takes_rows_with_one_response():
    """Eight rows of which some have a chosen, some a rejected response, some both: TRL sees ten examples."""
    rows, mismatched = random_rows(7), random_rows(8)
    has_chosen, has_rejected = [1, 1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1, 0, 1]
    has = torch.tensor([*has_chosen, *has_rejected]).bool()
    examples = Rows(rows.logps[has], rows.mask[has], rows.reference[has])
    theirs, _ = kto_trainer_loss(examples, (torch.arange(16) < 8)[has], mismatched, 0.3, 1.2, 0.9)
    kl = kl_estimate((mismatched.logps.sum(dim=1) - mismatched.reference).sum(), 16)
    sparse = Rows(rows.logps * has[:, None], rows.mask & has[:, None], rows.reference * has)
    settings = settings_of("kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.9)
    ours, values = our_loss("kto", sparse, settings, kl)
    assert_same(ours, theirs, rows, EXACT[torch.float64])
    assert not values.rewards_rejected[~has[8:]].any()


def test_kto_without_a_reference_point_is_refused():
    with pytest.raises(ValueError, match="KL"):
        our_loss("kto", random_rows(0), settings_of("kto"))


# --- CPOTrainer and ORPOTrainer: on the logits of a batch, NLL term included ------------------------------------
def token_batch(seed, prompt_tokens=None, vocabulary=11):
    """(TRL's batch, logits as a leaf, the same as `Rows`)."""
    chance = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return [
            torch.randint(1, vocabulary, (int(torch.randint(low, high, (), generator=chance)),)).tolist()
            for _ in range(8)
        ]

    batch = cpo_batch(ids(*((prompt_tokens, prompt_tokens + 1) if prompt_tokens else (1, 6))), ids(1, 21), ids(1, 21))
    trainer = cpo_trainer("sigmoid", 1.0)
    whole = trainer.concatenated_inputs(batch)
    labels = whole["concatenated_labels"][:, 1:]
    shape = (*whole["concatenated_input_ids"].shape, vocabulary)
    logits = torch.randn(shape, generator=chance, dtype=torch.float64).requires_grad_()
    table = logits[:, :-1].log_softmax(dim=-1)
    logps = table.gather(2, labels.clamp(min=0)[..., None]).squeeze(2) * (labels != -100)
    return batch, logits, Rows(logps, labels != -100, torch.zeros(16, dtype=torch.float64))


def assert_same_of_logits(ours, theirs, logits, tolerance):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **tolerance)
    found = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*found, **tolerance)


@pytest.mark.parametrize("nll_weight", [0.0, 1.0, 0.2])
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2), (2.0, 0.0)])
@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_cpo_and_simpo_are_those_of_cpo_trainer(name, beta, smoothing, nll_weight):
    gamma = {"simpo_gamma": 0.4} if name == "simpo" else {}
    settings = settings_of(name, beta=beta, label_smoothing=smoothing, nll_weight=nll_weight, **gamma)
    for seed in range(3):
        batch, logits, rows = token_batch(seed)
        kind = {"cpo": "sigmoid", "simpo": "simpo"}[name]
        trainer = cpo_trainer(kind, beta, smoothing, settings.simpo_gamma, nll_weight)
        theirs, metrics = trainer.get_batch_loss_metrics(lambda *_, logits=logits, **__: Logits(logits), batch)
        ours, values = our_loss(name, rows, settings)
        assert_same_of_logits(ours, theirs, logits, EXACT[torch.float64])
        assert values.rewards_chosen.mean().item() == pytest.approx(metrics["rewards/chosen"])
        assert values.rewards_rejected.mean().item() == pytest.approx(metrics["rewards/rejected"])


@pytest.mark.parametrize("beta", BETAS)
def test_orpo_is_that_of_orpo_trainer(beta):
    """Prompts of one token: TRL's NLL term covers the prompt, too, and of one token there is nothing to predict."""
    for seed in range(3):
        batch, logits, rows = token_batch(seed, prompt_tokens=1)
        theirs, metrics = orpo_trainer(beta).get_batch_loss_metrics(lambda *_, x=logits, **__: Logits(x), batch)
        ours, values = our_loss("orpo", rows, settings_of("orpo", beta=beta))
        assert_same_of_logits(ours, theirs, logits, EXACT[torch.float32])  # TRL takes its odds in float32
        assert values.rewards_chosen.mean().item() == pytest.approx(metrics["rewards/chosen"])
        assert values.rewards_rejected.mean().item() == pytest.approx(metrics["rewards/rejected"])


@pytest.mark.parametrize("beta", BETAS)
def test_the_odds_ratio_of_orpo_is_trls_for_any_prompt(beta):
    rows = random_rows(2, dtype=torch.float32)
    means = rows.logps.sum(dim=1) / rows.tokens
    theirs = -orpo_trainer(beta).odds_ratio_loss(*means.chunk(2))[0].mean()
    ours, _ = our_loss("orpo", rows, settings_of("orpo", beta=beta, nll_weight=0))
    assert_same(ours, theirs, rows, EXACT[torch.float32])


class Logits:
    def __init__(self, logits):
        self.logits = logits


# --- on a model: TRL's forward pass against ours, gradients of all parameters -------------------------------------
def trl_model(seed):
    model = make_model(seed)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    return model


def trl_logps(model, batch):
    """By TRL's own forward pass."""
    labels = batch["input_ids"][:, : batch["response_mask"].shape[1]].masked_fill(~batch["response_mask"], -100)
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**arguments, labels=labels, fused_lm_head=True).log_probs


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_of_a_model_are_trls(name):
    """Float32: their model, log-probs and loss; ours."""
    data = with_references(ResponseLogProbs(make_model(2)), examples())
    settings, kl = settings_of(name), torch.tensor(0.7) if name == "kto" else None
    ours = make_model(1)
    ours.set_attn_implementation(PACKED)
    mine = loss_of(ResponseLogProbs(ours), data, name, settings, kl)
    mine.backward()

    model = trl_model(1)
    theirs = trl_loss_of_model(name, model, trl_model(2), data, settings)
    theirs.backward()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(ours), gradients(model), rtol=1e-4, atol=1e-6)


def trl_loss_of_model(name, model, reference, data, settings):
    items = [data.item(place) for place in range(len(data))]
    prompts = [prompt.tolist() for prompt, _ in items]
    chosen, rejected = ([responses[side].tolist() for _, responses in items] for side in (0, 1))
    inputs = padded([*zip(prompts, chosen, strict=True), *zip(prompts, rejected, strict=True)])
    if name in ("cpo", "simpo", "orpo"):
        batch = cpo_batch(prompts, chosen, rejected)
        if name == "orpo":
            return trl_orpo_of_model(model, batch, settings)
        kind = {"cpo": "sigmoid"}.get(name, name)
        trainer = cpo_trainer(kind, settings.beta, 0.0, settings.simpo_gamma, settings.nll_weight)
        return trainer.get_batch_loss_metrics(model, batch)[0]
    with torch.no_grad():
        sums = trl_logps(reference, inputs).sum(dim=1)
    rows = Rows(trl_logps(model, inputs), inputs["response_mask"][:, 1:], sums)
    if name == "kto":
        half = torch.full((len(rows.reference),), 0.7)
        moved = Rows(torch.zeros_like(rows.logps.detach()), rows.mask, -half)
        return kto_trainer_loss(rows, torch.arange(8) < 4, moved, settings.beta, 1.0, 1.0)[0]
    return dpo_trainer_loss(rows, [DPO_TYPES[name]], settings.beta, settings.label_smoothing)[0]


def trl_orpo_of_model(model, batch, settings):
    """TRL's odds ratio, and the NLL term of TRL's CPO, which covers responses only as the paper's does."""
    trainer = cpo_trainer("simpo", 1.0, alpha=1.0)
    chosen, rejected, _, _, nll = trainer.concatenated_forward(model, batch)
    return nll - orpo_trainer(settings.beta).odds_ratio_loss(chosen, rejected)[0].mean()


# --- what holds of each loss --------------------------------------------------------------------------------------
AT_START = {
    "dpo_norm": lambda s: math.log(2),
    "dpo": lambda s: math.log(2),
    "robust": lambda s: math.log(2),
    "ipo": lambda s: (1 / (2 * s.beta)) ** 2,
    "hinge": lambda s: 1.0,
    "kto": lambda s: 0.5,
    "apo_zero": lambda s: 1.0,
    "apo_down": lambda s: 1.0,
}


@pytest.mark.parametrize("name", list(AT_START))
def test_the_untouched_student_has_the_loss_that_the_formula_says(name):
    rows = random_rows(3)
    rows = replace(rows, reference=rows.logps.detach().sum(dim=1))
    loss, values = our_loss(name, rows, settings_of(name), torch.tensor(0.0))
    assert loss.item() == pytest.approx(AT_START[name](settings_of(name)), abs=1e-12)
    assert not values.rewards_chosen.any() and not values.rewards_rejected.any()


@pytest.mark.parametrize("name", ["dpo_norm", "dpo", "cpo"])
def test_half_smoothed_is_symmetric(name):
    """As the share of wrong labels nears one half, swapping the sides changes nothing more."""
    loss, half = LOSSES[name], LossSettings(beta=0.3, label_smoothing=0.5)
    rows = random_rows(5)
    sides = split_sides(rows.logps.sum(dim=1), rows.tokens, rows.reference, both=True)
    torch.testing.assert_close(loss(*sides, half).losses, loss(*sides[::-1], half).losses)


def test_robust_is_dpo_in_the_mean_over_flips():
    rows, settings = random_rows(6), settings_of("robust", label_smoothing=0.3)
    sides = split_sides(rows.logps.sum(dim=1), rows.tokens, rows.reference, both=True)
    robust = [LOSSES["robust"](*order, settings).losses for order in (sides, sides[::-1])]
    true = LOSSES["dpo"](*sides, settings_of("dpo")).losses
    torch.testing.assert_close(0.7 * robust[0] + 0.3 * robust[1], true)


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_batch_in_pieces_has_the_loss_and_gradient_of_the_whole(name):
    """Also with rows of weight 0 among them, and with an NLL term."""
    rows = random_rows(9)
    more = {} if name == "sft" else {"nll_weight": 0.4}
    settings, kl = settings_of(name, **more), torch.tensor(1.5)
    for pieces in ([[n] for n in range(8)], [[5, 0, 2], [1, 7], [3], [4, 6]]):
        parts = [our_loss(name, rows, settings, kl, torch.tensor(piece))[0] for piece in pieces]
        filler = our_loss(name, rows, settings, kl, torch.tensor([3, 1]), torch.zeros(2))[0]
        assert_same(sum(parts) + filler, our_loss(name, rows, settings, kl)[0], rows, EXACT[torch.float64])


@pytest.mark.parametrize("moved", [-1e4, -1e2, 1e2, 1e4])
@pytest.mark.parametrize("name", list(LOSSES))
def test_extreme_log_ratios_give_finite_losses_and_gradients(name, moved):
    """In float32; `moved` is by how much chosen beats rejected. Plain log-probs cannot be above 0."""
    chosen, rejected = [moved, 0.0, moved / 2, -1e-9], [0.0, moved, -moved / 2, -1e-9]
    logp = torch.tensor([*chosen, *rejected])
    logp = (logp if LOSSES[name].needs_reference else -logp.abs()).requires_grad_()
    tokens = torch.tensor([1, 1, 50, 50, 1, 1, 50, 50])
    settings = replace(settings_of(name), label_smoothing=settings_of(name).label_smoothing and 0.3)
    sides = split_sides(logp, tokens, torch.zeros(8), both=True)
    values = LOSSES[name](*sides, settings, torch.tensor(abs(moved)))
    total = contribution(values, torch.ones(4), Divisors(4, 102))
    (gradient,) = torch.autograd.grad(total, logp)
    assert total.isfinite() and gradient.isfinite().all()
    assert values.losses.isfinite().all()


def test_settings_of_a_recipe_are_the_losses_defaults_where_it_is_silent():
    assert settings_of("dpo_norm") == LossSettings(beta=5.0)
    assert settings_of("dpo") == LossSettings(beta=0.1)
    assert settings_of("cpo", beta=None) == LossSettings(beta=0.1, nll_weight=1.0)
    assert settings_of("simpo", simpo_gamma=0) == LossSettings(beta=2.0)
    assert Run(pairing="p", loss="kto").model_dump()["desirable_weight"] == 1.0


def test_divisors_count_what_the_loss_is_a_mean_over():
    chosen, rejected = [3, 0, 5], [2, 4, 0]
    found = {name: divisors(LOSSES[name], chosen, rejected) for name in ("dpo", "kto", "sft")}
    assert found == {"dpo": (3, 8), "kto": (4, 8), "sft": (8, 8)}


def test_the_kl_estimate_has_no_gradient_and_is_cut_at_zero_as_a_whole():
    ratios = torch.tensor([-1.0, 3.0], requires_grad=True)
    assert kl_estimate(ratios.sum(), 2).item() == 1.0 and not kl_estimate(ratios.sum(), 2).requires_grad
    assert kl_estimate(-ratios.sum(), 2).item() == 0.0


def test_no_gradient_goes_through_the_kl_estimate_that_a_loss_is_given():
    rows, kl = random_rows(0), torch.tensor(0.5, requires_grad=True)
    loss, _ = our_loss("kto", rows, settings_of("kto"), kl)
    assert torch.autograd.grad(loss, kl, allow_unused=True) == (None,)


def test_one_sided_batches_of_kto_need_no_rejected_side():
    chosen = Side(torch.tensor([-3.0, -4.0]), torch.tensor([2, 2]), torch.tensor([-4.0, -4.0]))
    absent = Side(torch.zeros(2), torch.zeros(2, dtype=torch.long), torch.zeros(2))
    settings, kl = settings_of("kto"), torch.tensor(0.5)
    assert torch.equal(
        LOSSES["kto"](chosen, None, settings, kl).losses, LOSSES["kto"](chosen, absent, settings, kl).losses
    )
