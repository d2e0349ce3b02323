"""The numbers of training: losses and their gradients over a batch, its cut into passes, schedules. No Ray."""

import math
import random
from itertools import chain
from pathlib import Path

import pytest
import torch
from pair_examples import TEXTS, cutter, examples, gradients, loss_of, with_references
from tiny_model import make_model, make_tokenizer

from deltaray.recipe.training import Run, Training
from deltaray.train.attention import PACKED
from deltaray.train.deepspeed_config import deepspeed_config
from deltaray.train.formulas import LossSettings
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.micro_batches import batch_at, plan_passes
from deltaray.train.schedule import learning_rate, total_steps


def student(seed=1, packed=True):
    model = make_model(seed)
    model.set_attn_implementation(PACKED if packed else "sdpa")
    return model


# --- against the definition and TRL ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dpo_norm", "dpo"])
def test_the_untouched_student_loses_ln_2(name):
    module = ResponseLogProbs(student())
    assert loss_of(module, with_references(module, examples()), name).item() == pytest.approx(math.log(2), abs=1e-6)


def test_sft_is_the_mean_over_all_tokens_of_the_batch():
    model, data, values = make_model(1), examples(), []
    for place in range(len(data)):
        prompt, (chosen,) = data.item(place, both=False)
        ids = torch.tensor([*prompt, *chosen])
        table = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        values += [table[at - 1, ids[at]] for at in range(len(prompt), len(ids))]
    loss = loss_of(ResponseLogProbs(student()), data, "sft", LossSettings(beta=1.0))
    torch.testing.assert_close(loss, -torch.stack(values).mean())


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """TRL's own trainer, whose `compute_loss` is asked for values and gradients."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in TEXTS
    ]

    def build(loss_type, beta):
        arguments = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), loss_type=[loss_type], beta=beta, use_cpu=True, bf16=False,
            report_to=[], per_device_train_batch_size=len(rows), gradient_checkpointing=False, max_length=64,
        )  # fmt: skip
        return DPOTrainer(
            model=make_model(1), ref_model=make_model(2), args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )  # fmt: skip

    return build


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("ours", "theirs", "beta"), [("dpo_norm", "sigmoid_norm", 5.0), ("dpo", "sigmoid", 0.1)])
def test_values_and_gradients_are_trls(trl_trainer, ours, theirs, beta, packed):
    trainer = trl_trainer(theirs, beta)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()

    policy = student(1, packed)
    data = with_references(ResponseLogProbs(student(2, packed)), examples())
    loss = loss_of(ResponseLogProbs(policy), data, ours, LossSettings(beta=beta))
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    theirs_grad = {name.removeprefix("module."): value for name, value in gradients(trainer.model).items()}
    torch.testing.assert_close(gradients(policy), theirs_grad, rtol=1e-4, atol=1e-6)


# --- batches --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dpo_norm", "sft", "orpo"])
@pytest.mark.parametrize(("workers", "budget"), [(1, 1), (3, 1), (2, 60), (8, 1000), (1, 1000)])
def test_a_batch_cut_in_any_way_has_the_gradient_of_the_whole(name, workers, budget):
    data = with_references(ResponseLogProbs(student(2)), examples(TEXTS + TEXTS[1:]))

    def gradient(workers, budget):
        model = student(1)
        module = ResponseLogProbs(model)
        shares = [cutter(name, module, rank, workers, budget).passes(data, range(7)) for rank in range(workers)]
        assert len({len(share) for share in shares}) == 1
        loss_of(module, data, name, shares=[*chain.from_iterable(shares)]).backward()
        return gradients(model)

    torch.testing.assert_close(gradient(workers, budget), gradient(1, 10_000), rtol=1e-4, atol=1e-5)


def test_passes_hold_every_pair_once_within_the_budget():
    chance = random.Random(0)
    for _ in range(500):
        costs = [chance.randint(1, 100) for _ in range(chance.randint(1, 40))]
        workers, budget, padded = chance.randint(1, 5), chance.randint(1, 300), chance.random() < 0.5
        plan = plan_passes(range(len(costs)), costs, workers, budget, padded)
        shares = [share for passed in plan for share in passed]
        assert sorted(place for share in shares for place, weight in share if weight) == list(range(len(costs)))
        assert {len(passed) for passed in plan} == {workers} and all(shares)
        for share in shares:
            own = [costs[place] for place, _ in share]
            assert len(share) == 1 or (max(own) * len(own) if padded else sum(own)) <= budget


def test_passes_are_balanced_and_the_longest_come_first():
    plan = plan_passes(range(8), [5, 5, 5, 5, 9, 1, 1, 1], workers=2, budget=12)
    assert [[place for place, _ in share] for passed in plan for share in passed] == [[4], [0, 1], [2, 3], [5, 6, 7]]


def test_every_epoch_holds_every_pair_once_in_its_own_order():
    epochs = [[place for step in range(4) for place in batch_at(13, 4, 7, 4 * epoch + step)] for epoch in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(13))] * 2
    assert epochs[0] != epochs[1]
    assert batch_at(13, 4, 7, 2) == batch_at(13, 4, 7, 2) != batch_at(13, 4, 8, 2)


# --- schedule and configuration -------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_the_peak_and_falls_to_the_floor(schedule):
    run = Run(pairing="p", learning_rate=1.0, schedule=schedule, warmup_ratio=0.2, min_learning_rate_ratio=0.1)
    rates = [learning_rate(run, step, 20) for step in range(21)]
    assert 0 < rates[0] < rates[3] < rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_steps_count_the_last_small_batch_and_stop_at_max_steps():
    run = Run(pairing="p", batch_size=4, epochs=2)
    assert total_steps(9, run) == 6
    assert total_steps(9, run.model_copy(update={"max_steps": 5})) == 5


def test_deepspeed_is_told_what_the_recipe_says():
    training = Training(runs={}, workers=4, zero_stage=2, offload="optimizer")
    config = deepspeed_config(training, Run(pairing="p", batch_size=32, max_grad_norm=0.5))
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert "bf16" not in deepspeed_config(training.model_copy(update={"dtype": "float32"}), Run(pairing="p"))
    on_disk = deepspeed_config(Training(runs={}), Run(pairing="p"), Path("/fast"))["zero_optimization"]
    assert on_disk["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast"}
