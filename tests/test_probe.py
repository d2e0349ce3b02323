"""Log-probs against the model's own logits: soft caps, scales, windows, sinks, recurrence, experts, wrong models."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import make_model, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from deltaray.errors import UserError
from deltaray.recipe.models import Student
from deltaray.recipe.training import Lora
from deltaray.train import probe
from deltaray.train.adapter import targets_of, with_adapter
from deltaray.train.check import check_trainable
from deltaray.train.experts import Routing, drift
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.packing import pad
from deltaray.train.probe import judge, settle
from deltaray.train.small import small_copy
from deltaray.train.student import is_packed, load_module

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(kind, **more):
    return AutoConfig.for_model(kind, **TINY | more)


def gemma4(cap):
    """The wrapper: what its text part is like stands in a configuration of its own."""
    text = TINY | {"global_head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64}
    text |= {
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": cap,
        "sliding_window": 9,
    }
    return AutoConfig.for_model("gemma4", text_config=text, vision_config=None, audio_config=None)


def model_of(settings):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 3.0)  # logits as large as a trained model's
    return model


def some():
    draw = np.random.default_rng(4).integers
    ids = [draw(3, 60, count).astype(np.int32) for count in (11, 7, 5, 9, 6)]
    return [(ids[0], [ids[1], ids[2]]), (ids[3], [ids[4]])]


def plain(model, items):
    """By the definition, each text alone."""
    found = []
    for prompt, responses in items:
        for response in responses:
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
            table = model(input_ids=ids).logits[0].float().log_softmax(dim=-1)
            found.append(sum(table[at - 1, ids[0, at]] for at in range(len(prompt), ids.shape[1])))
    return torch.stack(found)


RESCALING = {
    "gemma2": lambda: config("gemma2", final_logit_softcapping=12.0, query_pre_attn_scalar=8, sliding_window=6),
    "gemma4 wrapper": lambda: gemma4(12.0),
    "granite": lambda: config("granite", logits_scaling=8.0),
    "cohere": lambda: config("cohere", logit_scale=0.06),
    "recurrent gemma": lambda: config("recurrent_gemma", logits_soft_cap=12.0, lru_width=32, attention_window_size=6),
    "minicpm3": lambda: small_copy(AutoConfig.for_model("minicpm3")).config,
}


@pytest.mark.parametrize("name", list(RESCALING))
def test_rescaled_logits_are_those_of_the_models_own_head(name):
    """Values, and gradients down to the first layer, with the output layer in one chunk and in many."""
    model, items = model_of(RESCALING[name]()), some()
    expected = plain(model, items)
    expected.sum().backward()
    gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    for at_once in (3, 10_000):
        model.zero_grad()
        module = ResponseLogProbs(model, chunk=4 * 64 * at_once)
        assert not module.head.own.plain
        found = module(**pad(items, 0).arguments())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        found.sum().backward()
        for key, value in gradients.items():
            torch.testing.assert_close(model.get_parameter(key).grad, value, rtol=1e-3, atol=1e-3)


def test_a_head_is_no_part_of_the_state():
    module = ResponseLogProbs(model_of(config("granite", logits_scaling=8.0)))
    assert all(key.startswith("model.") for key in module.state_dict())
    assert [name for name, _ in module.head.named_parameters()] == []
    assert {id(weight) for weight in module.head.own.parameters} <= {id(weight) for weight in module.parameters()}


def test_plain_logits_take_the_short_way():
    assert ResponseLogProbs(make_model()).head.own.plain
    assert not ResponseLogProbs(with_adapter(make_model(), Lora(targets=["lm_head", "q_proj"]))).head.own.plain


WAYS = {
    "llama": (lambda: AutoConfig.for_model("llama"), "packed"),
    "qwen3 with experts": (lambda: AutoConfig.for_model("qwen3_moe"), "packed"),
    "gemma4 wrapper": (lambda: gemma4(30.0), "packed"),
    "granite": (lambda: AutoConfig.for_model("granite", logits_scaling=8.0), "packed"),
    "cohere": (lambda: AutoConfig.for_model("cohere"), "packed"),
    "phimoe with a window": (lambda: AutoConfig.for_model("phimoe", sliding_window=2047), "padded"),
    "gpt-oss, sinks": (lambda: AutoConfig.for_model("gpt_oss"), "padded"),
    "mamba, recurrent": (lambda: AutoConfig.for_model("mamba"), "padded"),
    "qwen3.5, recurrent layers": (lambda: AutoConfig.for_model("qwen3_5_text"), "padded"),
    "llama 4": (lambda: AutoConfig.for_model("llama4_text"), "padded"),
    "nemotron": (lambda: AutoConfig.for_model("nemotron", num_key_value_heads=8), "padded"),
    "bert, no causal model": (lambda: AutoConfig.for_model("bert"), "refused"),
}


@pytest.mark.parametrize("name", list(WAYS))
def test_how_an_architecture_is_trained(name):
    make, way = WAYS[name]
    found = judge(make())
    assert found.way == way, found
    assert bool(found.reason) == (way != "packed")


def test_attention_that_leaves_out_soft_caps_is_not_used():
    found = judge(AutoConfig.for_model("gemma2"))
    assert (found.way, found.head, found.attention) == ("padded", "own", "eager")


def test_what_is_wrong_beyond_a_window_is_padded_up_to_it(tmp_path):
    found = judge(AutoConfig.for_model("doge"))
    assert (found.way, found.longest) == ("padded", 2048)
    AutoConfig.for_model("doge").save_pretrained(tmp_path)
    assert check_trainable(Student(model=str(tmp_path)), "student") == found
    with pytest.raises(UserError, match="max_length is 4096"):
        check_trainable(Student(model=str(tmp_path), max_length=4096), "student")


def test_positions_that_depend_on_the_longest_text_bound_max_length(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "rope_theta": 1e4}
    found = AutoConfig.for_model("phi3", rope_parameters=rope | {"original_max_position_embeddings": 4096})
    found.save_pretrained(tmp_path)
    assert check_trainable(Student(model=str(tmp_path)), "student").packed
    with pytest.raises(UserError, match="max_length is 5000; beyond 4096 tokens its position embeddings"):
        check_trainable(Student(model=str(tmp_path), max_length=5000), "student")


def test_a_small_copy_leaves_global_chance_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    small_copy(AutoConfig.for_model("qwen2"))
    assert torch.equal(torch.rand(3), expected)


# --- the loaded model ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_loaded_student_is_packed(tmp_path, dtype, lora):
    student = Student(model=save_tiny(tmp_path))
    module = load_module(student, dtype, lora)
    settle(module, student, "cpu")
    assert is_packed(module)


def shifted(forward):
    """A forward pass whose hidden states depend on how many rows there are."""

    def wrong(self, input_ids=None, **named):
        found = forward(self, input_ids=input_ids, **named)
        found.last_hidden_state = found.last_hidden_state * (1 + 0.2 * (len(input_ids) - 1))
        return found

    return wrong


def leaking(forward):
    """Every token of a packed row hears of the one before it, whosever that is."""

    def wrong(self, input_ids=None, **named):
        found = forward(self, input_ids=input_ids, **named)
        if "layout" in named:
            found.last_hidden_state = found.last_hidden_state + 0.2 * found.last_hidden_state.roll(1, dims=1)
        return found

    return wrong


def test_a_model_that_is_wrong_padded_is_refused(tmp_path, monkeypatch):
    student = Student(model=save_tiny(tmp_path))
    module = load_module(student, "float32")
    kind = type(module.model.model)
    monkeypatch.setattr(kind, "forward", shifted(kind.forward))
    with pytest.raises(
        UserError, match=r"`llama`.*cannot be trained: log-probs of padded rows differ .* nats per token"
    ):
        settle(module, student, "cpu")
    probe._judge.cache_clear()
    with pytest.raises(UserError, match="cannot be trained"):
        check_trainable(student, "student")
    probe._judge.cache_clear()


def test_a_model_that_is_wrong_packed_is_padded(tmp_path, monkeypatch):
    student = Student(model=save_tiny(tmp_path))
    module = load_module(student, "float32")
    assert is_packed(module)
    kind = type(module.model.model)
    monkeypatch.setattr(kind, "forward", leaking(kind.forward))
    settle(module, student, "cpu")
    assert not is_packed(module)
    assert module.model.config._attn_implementation == "sdpa"


def test_the_most_careful_worker_decides(tmp_path, monkeypatch):
    student = Student(model=save_tiny(tmp_path))
    module = load_module(student, "float32")
    monkeypatch.setattr(probe.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(probe.dist, "get_world_size", lambda: 2)

    def gather(found, own):
        found[:] = [own, probe.Verdict("padded", "another machine")]

    monkeypatch.setattr(probe.dist, "all_gather_object", gather)
    settle(module, student, "cpu")
    assert not is_packed(module)


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_a_type_without_a_causal_model_is_refused_by_name(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"no causal language model for the type `{kind}`"):
        check_trainable(Student(model=str(tmp_path)), "student")


# --- experts ------------------------------------------------------------------------------------------------------
def experts(**more):
    return model_of(config("qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[], **MOE | more))


def test_an_adapter_of_a_mixture_of_experts_leaves_the_experts_out():
    assert targets_of(experts(), Lora()) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    adapted = with_adapter(experts(), Lora(rank=2)).peft_config["default"]
    assert not adapted.target_parameters and set(adapted.target_modules) == {"k_proj", "o_proj", "q_proj", "v_proj"}
    assert targets_of(make_model(), Lora()) == "all-linear"


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_proj", "up_proj", "down_proj"], ["q_proj", "experts"]])
def test_targets_that_reach_into_experts_are_refused(targets):
    with pytest.raises(UserError, match=r"lora.targets: .* would reach into the experts"):
        with_adapter(experts(), Lora(rank=2, targets=targets))


def test_routers_losses_play_no_part():
    """A configuration that asks for auxiliary losses gives the same gradients."""
    found = []
    for asked in (True, False):
        module = ResponseLogProbs(experts(output_router_logits=asked, router_aux_loss_coef=10.0)).train()
        module(**pad(some(), 0).arguments()).sum().backward()
        found.append([weight.grad for weight in module.parameters() if weight.grad is not None])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_routing_drift_counts_changed_decisions():
    model = experts()
    routing, ids = Routing(model), torch.arange(3, 43)[None]

    def routed():
        with torch.no_grad(), routing.watched() as chosen:
            model(input_ids=ids)
        return chosen

    before = routed()
    assert [tuple(layer.shape) for layer in before] == [(40, 2), (40, 2)]
    assert drift(before, routed()) == 0.0
    with torch.no_grad():
        last = model.model.layers[-1].mlp.gate.weight
        last.copy_(last.flip(0))
    assert 0.2 < drift(before, routed()) <= 0.5  # one layer of two
    assert drift([], []) is None
    assert Routing(make_model()).experts == []


def test_the_table_of_architectures_says_what_becomes_of_each():
    sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
    from architectures import look, table

    found = {kind: look(kind) for kind in ("llama", "gpt_oss", "musicgen")}
    assert [item["way"] for item in found.values()] == ["packed", "padded", "not tried"]
    assert "| `gpt_oss` | padded | packed rows fail: " in table(found)
