"""The numbers of training: log-probabilities, losses and their gradients, batches, schedules. One process, no Ray."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_model import make_model, make_tokenizer

from deltaray.recipe.training import Run, Training
from deltaray.train.batches import (
    Example,
    batch_at,
    collate,
    denominator,
    micro_batches,
    pad,
    response_ids,
    slice_batch,
)
from deltaray.train.deepspeed_config import deepspeed_config
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.losses import LOSSES, split_sides
from deltaray.train.schedule import learning_rate, total_steps

PAIRS = [("1+1=", "2", "three"), ("12+34=", "46 i think", "4"), ("9+9=", "eighteen", "99"), ("5+50=", "55", "fifty")]


def examples(tokenizer=None):
    tokenizer = tokenizer or make_tokenizer()
    found = []
    for prompt, *answers in PAIRS:
        sides = [response_ids(tokenizer, [{"role": "user", "content": prompt}], text, 64) for text in answers]
        found.append(Example(sides[0][0], sides[0][1], sides[1][1]))
    return found


def with_references(module, rows):
    batch = collate(rows, [1.0] * len(rows), 0, both=True)
    with torch.no_grad():
        logp = module(**batch.inputs)[0].tolist()
    half = len(rows)
    return [replace(row, reference_chosen=logp[n], reference_rejected=logp[half + n]) for n, row in enumerate(rows)]


def loss_of(module, rows, name, beta, divisor=None, weights=None):
    """The part of a global batch's loss that these rows contribute."""
    loss = LOSSES[name]
    batch = collate(rows, weights or [1.0] * len(rows), 0, loss.needs_rejected)
    logp, tokens = module(**batch.inputs)
    values = loss.function(*split_sides(logp, tokens, batch.reference, loss.needs_rejected), beta)
    return (values.losses * batch.weights).sum() / (divisor or denominator(loss, rows))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- log-probabilities ----------------------------------------------------------------------------------------
def plain_log_probs(model, row):
    """From the model's own logits: the definition, one response at a time, without padding."""
    ids = torch.tensor([row.prompt + row.chosen])
    table = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    return sum(table[len(row.prompt) + n - 1, token] for n, token in enumerate(row.chosen))


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_log_probs_are_those_of_the_models_logits(chunk):
    model = make_model()
    rows = examples()
    logp, tokens = ResponseLogProbs(model, chunk)(**collate(rows, [1.0] * 4, 0, both=False).inputs)
    assert tokens.tolist() == [len(row.chosen) for row in rows]
    expected = torch.stack([plain_log_probs(model, row) for row in rows])
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-5)


def test_chunks_change_no_gradient():
    found = []
    for chunk in (2, 1024):
        model = make_model()
        ResponseLogProbs(model, chunk)(**collate(examples(), [1.0] * 4, 0, both=True).inputs)[0].sum().backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    module = ResponseLogProbs(make_model())
    row = (examples()[0].prompt, examples()[0].chosen)
    alone = module(**pad([row], 0))[0]
    padded = module(**pad([row, (row[0], row[1] * 20)], 0))[0][:1]
    other_id = module(**pad([row, (row[0], row[1] * 20)], 7))[0][:1]
    torch.testing.assert_close(alone, padded, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded, other_id, rtol=0, atol=0)


def test_models_that_rescale_their_logits_are_refused():
    model = make_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        ResponseLogProbs(model)


# --- losses ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dpo_norm", "dpo"])
def test_the_untouched_student_loses_ln_2(name):
    module = ResponseLogProbs(make_model())
    assert loss_of(module, with_references(module, examples()), name, 5.0).item() == pytest.approx(
        math.log(2), abs=1e-6
    )


def test_sft_is_the_mean_over_all_tokens_of_the_batch():
    model, rows = make_model(), examples()
    tokens = sum(len(row.chosen) for row in rows)
    expected = -sum(plain_log_probs(model, row) for row in rows) / tokens
    torch.testing.assert_close(loss_of(ResponseLogProbs(model), rows, "sft", 1.0), expected)


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
        for prompt, chosen, rejected in PAIRS
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


@pytest.mark.parametrize(("ours", "theirs", "beta"), [("dpo_norm", "sigmoid_norm", 5.0), ("dpo", "sigmoid", 0.1)])
def test_values_and_gradients_are_trls(trl_trainer, ours, theirs, beta):
    trainer = trl_trainer(theirs, beta)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()

    policy = make_model(1)
    rows = with_references(ResponseLogProbs(make_model(2)), examples())
    loss = loss_of(ResponseLogProbs(policy), rows, ours, beta)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    theirs_grad = {name.removeprefix("module."): value for name, value in gradients(trainer.model).items()}
    torch.testing.assert_close(gradients(policy), theirs_grad, rtol=1e-4, atol=1e-6)


# --- batches --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dpo_norm", "sft"])
@pytest.mark.parametrize(("workers", "micro"), [(1, 1), (3, 1), (2, 2), (8, 1), (1, 8)])
def test_a_batch_cut_in_any_way_has_the_gradient_of_the_whole(name, workers, micro):
    def gradient(shares):
        model = make_model(1)
        module = ResponseLogProbs(model)
        divisor = denominator(LOSSES[name], rows)
        for share in shares:
            part = [rows[index] for index, _ in share]
            loss_of(module, part, name, 5.0, divisor, [weight for _, weight in share]).backward()
        return gradients(model)

    rows = with_references(ResponseLogProbs(make_model(2)), examples() + examples()[1:])
    slices = slice_batch(range(7), [row.length(both=True) for row in rows], workers, micro)
    assert {len(share) for step in slices for share in step} == {len(slices[0][0])}
    assert {len(step) for step in slices} == {workers}
    assert sorted(index for step in slices for share in step for index, weight in share if weight) == list(range(7))
    whole = gradient([[(index, 1.0) for index in range(7)]])
    torch.testing.assert_close(gradient([share for step in slices for share in step]), whole, rtol=1e-4, atol=1e-5)


def test_every_epoch_holds_every_pair_once_in_its_own_order():
    epochs = [[index for step in range(4) for index in batch_at(13, 4, 7, 4 * epoch + step)] for epoch in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(13))] * 2
    assert epochs[0] != epochs[1]
    assert batch_at(13, 4, 7, 2) == batch_at(13, 4, 7, 2) != batch_at(13, 4, 8, 2)


def test_short_batches_make_no_needless_padding_rows():
    assert micro_batches(32, 2, 8) == (8, 2)
    assert micro_batches(9, 2, 8) == (5, 1)
    assert micro_batches(1, 4, 8) == (1, 1)


def test_a_prompt_that_leaves_no_room_gives_no_ids():
    ids = partial(response_ids, make_tokenizer(), [{"role": "user", "content": "1+1="}], "twenty")
    assert ids(8) is None
    prompt, response = ids(9)
    assert len(prompt + response) == 9
    assert response[-1] == make_tokenizer().eos_token_id


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
    training = Training(runs={}, workers=4, micro_batch_size=2, zero_stage=2)
    config = deepspeed_config(training, Run(pairing="p", batch_size=32, max_grad_norm=0.5))
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 4)
    assert config["zero_optimization"]["stage"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert "bf16" not in deepspeed_config(training.model_copy(update={"dtype": "float32"}), Run(pairing="p"))
