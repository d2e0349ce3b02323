"""A small copy of an architecture: the same code and settings with random weights, thin, and with narrow windows.

What a model does wrong with packed or padded rows it does at any size, so it can be found out in a second and without
weights.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

MOST_WEIGHTS = 80_000_000
"""Larger copies are not made."""

VOCABULARY, LENGTH, WINDOW, HEADS, WIDTH = 96, 128, 6, 4, 8
CAP = 2.0
"""Soft caps, which at their own size would not show in small numbers."""

COMMON: dict[str, Any] = PreTrainedConfig().to_dict()
"""What every configuration has; parts of one may refuse it."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size"), HEADS * WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), HEADS * WIDTH),
    **dict.fromkeys(("attention_hidden_size", "lru_width"), HEADS * WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_inner", "dff", "n_inner", "dim_ff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "shared_intermediate_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    "index_n_heads": 16,  # with few of them scores are often equal, and which tokens are taken is chance
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_global_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "qk_rope_head_dim"), WIDTH),
    **dict.fromkeys(("qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), WIDTH),
    **dict.fromkeys(("dim_head", "kv_channels", "index_head_dim", "d_head", "query_pre_attn_scalar"), WIDTH),
    **dict.fromkeys(("rotary_dim", "o_lora_rank", "kv_lora_rank", "laurel_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_head_dim", "q_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("top_k_experts", "hc_mult"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "zero_expert_num"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "type_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), LENGTH),
    **dict.fromkeys(("model_max_length", "max_target_positions", "rel_extent"), LENGTH),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("state_size", "mamba_chunk_size", "chunk_size", "block_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_d_ssm", "n_mamba_heads", "num_residual_heads"), 64),
    **dict.fromkeys(("time_step_rank", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("ple_embed_dim", "hc_lowrank", "adapter_rank", "gated_norm_rank", "d_rel"), 8),
}
"""Settings by which transformers' configurations name their sizes; those that a configuration lacks do not matter."""

WINDOWS = (
    "sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention",
    "attention_chunk_size", "keep_window_size", "index_topk",
)  # fmt: skip
"""Settings that say how many of a text's tokens a layer sees."""

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
RHYTHMS = ("interval", "period", "pattern", "every_n_layers", "sparse_step")
"""Ends of the names of settings that say which layers are of another kind."""


def small_copy(config: PreTrainedConfig, trust_remote_code: bool = False, narrow: bool = True) -> Any:
    """A float32 model on the CPU in evaluation mode, from the settings of a large one; global random state is kept.

    Args:
        narrow: windows are made narrower than the probe's texts.

    Raises:
        ValueError: none can be made, or it does not run.
    """
    first: Exception | None = None
    for thin in (True, False):
        try:
            return _build(_shrink(config, thin, narrow), trust_remote_code)
        except Exception as error:  # a configuration whose sizes depend on each other in a way not foreseen
            first = first or error
    words = str(first).strip().splitlines() or [""]
    raise ValueError(f"no small copy of the architecture could be made: {type(first).__name__}: {words[0][:200]}")


def narrowest(config: PreTrainedConfig) -> int | None:
    """The smallest of the windows that a narrow copy has narrower; None without any."""

    def windows(settings: dict[str, Any]) -> Iterator[int]:
        for name, value in settings.items():
            if isinstance(value, dict):
                yield from windows(value)
            elif name in WINDOWS and isinstance(value, int) and value > WINDOW:
                yield value

    return min(windows(config.to_dict()), default=None)


def turning_point(config: PreTrainedConfig) -> int | None:
    """The length from which on rotary embeddings depend on the longest text of a batch; None if they never do."""
    settings = config.get_text_config().to_dict()
    for rope in (settings.get("rope_parameters"), settings.get("rope_scaling")):
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            found = original or settings.get("original_max_position_embeddings") or settings["max_position_embeddings"]
            return int(found)
    return None


def _build(config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    def make() -> Any:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)

    with without_partitioning():
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in make().parameters())
        if weights > MOST_WEIGHTS:
            raise ValueError(f"its smallest copy still has {weights / 1e6:.0f} M weights")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = make().eval()
            _scatter(model)
            found = model(input_ids=torch.arange(5, 25)[None], use_cache=False)
    if not torch.isfinite(found.logits).all():
        raise ValueError("its logits are not finite")
    return model


def _scatter(model: Any) -> None:
    """Weights so large that each token hears of every other one, and that logits are spread as a trained model's."""
    layer = model.get_output_embeddings()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.85 / parameter.shape[-1] ** 0.5)
    if isinstance(getattr(layer, "weight", None), torch.Tensor):
        layer.weight.normal_(0, 5.0 / layer.weight.shape[-1] ** 0.5)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices so small gain nothing from more threads; and with one the bits are always the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_partitioning() -> Iterator[None]:
    """While ZeRO 3 is announced to transformers, every model that is made would be spread over the workers."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


# --- settings ---------------------------------------------------------------------------------------------------
def _shrink(config: PreTrainedConfig, thin: bool, narrow: bool) -> PreTrainedConfig:
    """The same settings with fewer layers and tokens; `thin`: with small matrices; `narrow`: with short windows."""
    changed = _shrunk(config.to_dict(), thin, narrow)
    changed.pop("quantization_config", None)
    return type(config).from_dict(changed)


def _shrunk(settings: dict[str, Any], thin: bool, narrow: bool) -> dict[str, Any]:
    found = copy.deepcopy(settings)
    for name, value in found.items():
        if isinstance(value, dict) and str(name).endswith("_config"):
            found[name] = {k: v for k, v in _shrunk(value, thin, narrow).items() if v is None or COMMON.get(k) != v}
    _fewer_layers(found)
    always = {name for name, size in SIZES.items() if size in (VOCABULARY, LENGTH)}
    for name, size in (SIZES | dict.fromkeys(WINDOWS if narrow else (), WINDOW)).items():
        if name in found and (thin or name in always or name in WINDOWS):
            found[name] = _at_most(found[name], size)
    for name, value in found.items():
        if isinstance(value, int | float) and value and "cap" in str(name) and "soft" in str(name):
            found[name] = CAP
        if str(name).endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            found[name] = 90 + sum(map(ord, name)) % 6
    if isinstance(found.get("eos_token_id"), list):
        found["eos_token_id"] = [2]
    if thin:
        _agree(found, settings)
    return found


def _at_most(value: Any, size: int) -> Any:
    if isinstance(value, list):
        return [_at_most(item, size) for item in value]
    return min(value, size) if type(value) is int else value


def _agree(found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Sizes that follow from others."""
    heads = "num_attention_heads"
    if settings.get("num_key_value_heads") == settings.get(heads) and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found[heads]
    if isinstance(found.get("layer_types"), list) and "per_layer_config" in found:
        found["per_layer_config"] = None
    if {"expand", "num_heads", "head_dim"} <= found.keys():
        found["num_heads"] = found["hidden_size"] * found["expand"] // found["head_dim"]
    if "attention_hidden_size" in found and "attention_head_dim" in found:
        found["attention_hidden_size"] = 2 * found["hidden_size"]
        found["attention_head_dim"] = found["attention_hidden_size"] // found[heads]
    if isinstance(found.get("layers_block_type"), list) and "hybrid_layer_ids" in found:
        found["hybrid_layer_ids"] = [at for at, kind in enumerate(found["layers_block_type"]) if kind == "hybrid"]
    if "rotary_dim" not in found and isinstance(settings.get("hidden_size"), int) and settings.get(heads):
        old = settings.get("head_dim") or settings["hidden_size"] // settings[heads]
        new = found.get("head_dim") or found["hidden_size"] // found[heads]
        for key in ("rope_parameters", "rope_scaling"):
            rope = found.get(key) or {}
            for name, value in rope.items():
                if isinstance(value, list):
                    rope[name] = value[: max(1, len(value) * new // old)]


def _fewer_layers(settings: dict[str, Any]) -> None:
    """Keeps one layer of every kind, twice over where later ones share what earlier ones keep."""
    depths = [name for name in DEPTHS if isinstance(settings.get(name), int)]
    if not depths:
        return
    depth = settings[depths[0]]
    lists = [name for name, value in settings.items() if isinstance(value, list) and len(value) == depth > 1]
    rhythm = [v for name, v in settings.items() if name.endswith(RHYTHMS) and isinstance(v, int) and 1 < v <= 8]
    kept = _first_of_each([settings[name] for name in lists], depth, max([2, *rhythm]))
    if settings.get("num_kv_shared_layers"):
        settings["num_kv_shared_layers"] = len(kept)
        kept = kept + kept
    for name in lists:
        settings[name] = [settings[name][place] for place in kept]
    for name in depths:
        settings[name] = len(kept)


def _first_of_each(lists: list[list[Any]], depth: int, least: int) -> list[int]:
    """Places of the first layer of every kind, at most eight, and at least so many layers."""
    seen: dict[str, int] = {}
    for place in range(depth):
        seen.setdefault(str([values[place] for values in lists]), place)
    kept = sorted(seen.values())[:8]
    more = [place for place in range(depth) if place not in kept]
    return sorted(kept + more[: max(0, least - len(kept))])
