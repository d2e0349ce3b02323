"""What can be known of a recipe's models before anything runs: from their configurations, tokenizers and the headers
of their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deltaray.data.tokens.check import check_tokenizer
from deltaray.data.tokens.load import TOKENIZER
from deltaray.errors import UserError, door, first_line, led_by
from deltaray.failures import cause_of
from deltaray.files import read_settings
from deltaray.limits import TOKENIZER_BYTES
from deltaray.model_files.folder import cached_folder, refuse_endless, refuse_pointers
from deltaray.model_files.headers import Held, tensors_of_model
from deltaray.recipe.models import Engine, Model, Student, Teacher
from deltaray.recipe.scorers import RewardModel

HUB_TIMEOUT = 20.0
"""Seconds."""
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files that must be what they seem, or another reader takes something else for granted."""
OVERRIDES = {"hf_overrides", "hf_config_path", "config_format", "load_format", "quantization", "model_impl"}
"""Engine arguments that make another model of the same files."""
NAMING_NO_TEXT = ("image", "audio", "video", "vision", "boi", "eoi", "boa", "eoa", "pad", "soft")
"""Parts of the names of a tokenizer's tokens which no text is made of: placeholders for images and sound, padding."""


def check_model(model: Model, key: str, saved: Literal["model", "adapter"] | None = None) -> None:
    """The model's folder is there and whole, its weights fit its configuration, and its tokenizer fits both.

    A model behind a server is judged by the server's address and key alone.

    Args:
        key: the recipe's key that names the model.
        saved: what will be saved of what is trained from this student.

    Raises:
        UserError: the first mistake, led by the key.
    """
    if isinstance(model, Teacher) and model.endpoint is not None:
        from deltaray.generate.endpoint import check_endpoint

        with door(f"{key}.endpoint", "cannot be used"):
            return check_endpoint(model.endpoint, f"{key}.endpoint")
    with door(f"{key}.model: {model.model}", "cannot be used"):
        _check_files(model, key, saved)


def _check_files(model: Model, key: str, saved: Literal["model", "adapter"] | None) -> None:
    if model.is_local:
        _check_folder(model, key)
    else:
        _find_on_hub(model, key)
    tokenizer = check_tokenizer(model, key)
    config = _config(model, key)
    if config is None:
        return
    held = _tensors(model, key)
    skeleton = _skeleton(model, key, config, held)
    _check_lengths(model, key, config)
    _check_vocabulary(model, key, config, tokenizer)
    if isinstance(model, Teacher) and model.adapter is not None:
        from deltaray.model_files.adapters import check_adapter

        check_adapter(Path(model.adapter), f"{key}.adapter", skeleton, held)
    if isinstance(model, Student):
        from deltaray.train.check import check_trainable

        check_trainable(model, key)
    if isinstance(model, Student) and saved:
        _check_saving(model, key, skeleton if saved == "model" else None, tokenizer)


def is_served(model: Model) -> bool:
    """Whether a server has it."""
    return isinstance(model, Teacher) and model.endpoint is not None


# --- where it lies ------------------------------------------------------------------------------------------------
def _check_folder(model: Model, key: str) -> None:
    folder = Path(model.model).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{key}.model: there is no folder {model.model}; give a Hugging Face model folder or a hub id (owner/name)"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}.model: {model.model} holds no config.json; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")) and not _own_format(model):
        raise UserError(
            f"{key}.model: {model.model} holds no *.safetensors; pickled weights can run code and are not loaded: save "
            "the model as safetensors"
        )
    refuse_pointers(folder, f"{key}.model")
    with led_by(f"{key}.model"):
        for name in SETTINGS:
            if (folder / name).exists():
                refuse_endless(folder / name, read_settings(folder / name))
        if (folder / TOKENIZER).exists():
            read_settings(folder / TOKENIZER, TOKENIZER_BYTES)


def _own_format(model: Model) -> bool:
    """Whether the recipe tells vLLM by itself how to read the weights."""
    return isinstance(model, Teacher) and "load_format" in model.engine.arguments


def _find_on_hub(model: Model, key: str) -> None:
    """One quick question, where loading would retry for most of a minute; what is in the local cache needs none."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = (try_to_load_from_cache(model.model, name, revision=model.revision) for name in SAFE_WEIGHTS)
    if any(isinstance(path, str) for path in cached):
        return
    try:
        found = HfApi().model_info(model.model, revision=model.revision, timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub's and the network's errors are many; all mean that it cannot be had here
        reason = cause_of(error).splitlines()[0]
        raise UserError(
            f"{key}.model: there is no folder {model.model} here, and it could not be fetched from the Hub: {reason}; "
            "correct the path or the id, or log in"
        ) from None
    if not any(file.rfilename.endswith(".safetensors") for file in found.siblings or []) and not _own_format(model):
        raise UserError(
            f"{key}.model: {model.model} has no *.safetensors on the hub; pickled weights can run code and are not "
            "loaded: choose a revision or a copy with safetensors"
        )


# --- weights ------------------------------------------------------------------------------------------------------
def _config(model: Model, key: str) -> Any:
    """None for a teacher whose kind transformers does not know: vLLM may."""
    from deltaray.model_files.fit import read_config

    try:
        config = read_config(model)
    except Exception as error:  # own code raises what it likes
        if isinstance(model, Teacher):
            return None
        if "custom code" in str(error) and not model.trust_remote_code:
            raise UserError(
                f"{key}.trust_remote_code: {model.model} has code of its own, which runs only if you trust it; look at "
                "it, then write true"
            ) from None
        raise UserError(f"{key}.model: {model.model!r} has no configuration to read: {first_line(error)}") from None
    if isinstance(model, RewardModel) and config.num_labels != 1:
        raise UserError(f"{key}.model: {model.model!r} gives {config.num_labels} numbers; name one that gives one")
    return config


def _tensors(model: Model, key: str) -> dict[str, Held]:
    """The tensors of its files; none where they are not on this machine, or are in a format of vLLM's own."""
    folder = cached_folder(model.model, model.revision)
    if folder is None or _own_format(model):
        return {}
    with led_by(f"{key}.model"):
        return tensors_of_model(folder, any_names=isinstance(model, Teacher))


def _skeleton(model: Model, key: str, config: Any, held: Mapping[str, Held]) -> Any:
    """The model without weights, once its weights are known to fit; None where it cannot be built."""
    from deltaray.model_files.fit import CAUSAL, SCORING, build, is_quantized, loading_info, misfit

    kind = SCORING if isinstance(model, RewardModel) else CAUSAL
    if isinstance(model, Teacher) and OVERRIDES & model.engine.arguments.keys():
        return None  # vLLM is told of another model than the files say
    try:
        skeleton = build(model, kind, config)
    except Exception as error:  # own code raises what it likes, and so does a configuration that is wrong in itself
        if isinstance(model, Teacher) or (model.trust_remote_code and getattr(config, "auto_map", None)):
            return None  # vLLM may know it; own code may need more than shapes
        what = "sequence classifier" if kind == SCORING else "causal language model"
        raise UserError(
            f"{key}.model: {model.model!r} is not a {what} that transformers knows: {first_line(error)}"
        ) from None
    if not held or is_quantized(config) or _has_quantizer_file(model):
        return skeleton
    try:
        info = loading_info(skeleton, held)
    except Exception as error:
        raise UserError(f"{key}.model: the weights of {model.model} cannot be loaded: {first_line(error)}") from None
    if wrong := misfit(info, kind, unexpected=not isinstance(model, Teacher)):  # vLLM itself refuses what is too much
        raise UserError(f"{key}.model: {model.model}: {wrong}")
    return skeleton


def _has_quantizer_file(model: Model) -> bool:
    """Some quantisers keep their settings in a file of their own."""
    folder = cached_folder(model.model, model.revision)
    return folder is not None and any(folder.glob("*quant*config.json"))


# --- lengths and tokens -------------------------------------------------------------------------------------------
def _check_lengths(model: Model, key: str, config: Any) -> None:
    from deltaray.model_files.fit import is_rotary, positions

    limit = positions(config)
    if limit is None:
        return
    # Rotary positions go on beyond their limit, so only a length that somebody chose is taken at its word.
    if (
        isinstance(model, Student | RewardModel)
        and model.max_length > limit
        and (model.max_length != type(model).model_fields["max_length"].default or not is_rotary(config))
    ):
        raise UserError(
            f"{key}.max_length: {model.max_length:,} tokens, but {model.model} has positions for {limit:,}; write "
            f"{limit} or less"
        )
    engine: Engine | None = getattr(model, "engine", None)
    if engine is None or OVERRIDES & engine.arguments.keys():
        return
    if engine.max_model_len is not None and engine.max_model_len > limit:
        raise UserError(
            f"{key}.engine.max_model_len: {engine.max_model_len:,} tokens, but {model.model} has positions for "
            f"{limit:,}; write {limit} or less"
        )


def _check_vocabulary(model: Model, key: str, config: Any, tokenizer: Any) -> None:
    """Every token that a text can become has a row in the embedding."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        return
    try:
        beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    except NotImplementedError:  # some of own code
        return
    for token in _naming_no_text(tokenizer):
        beyond.pop(token, None)
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise UserError(
            f"{key}.model: the tokenizer of {model.model} has tokens that the model's embedding of {rows:,} rows has "
            f"no row for: {token!r} is {number:,}" + (f" ({len(beyond):,} such tokens)" if len(beyond) > 1 else "")
            + "; resize the embedding (resize_token_embeddings) and save the model, or take the tokens out of its files"
        )  # fmt: skip


def _naming_no_text(tokenizer: Any) -> set[str]:
    """Tokens that a tokenizer's configuration names as placeholders or padding."""
    named = {**getattr(tokenizer, "init_kwargs", {}), **getattr(tokenizer, "special_tokens_map", {})}
    tokens = {name: str(token) for name, token in named.items() if name.endswith("_token") and token is not None}
    idle = {token for name, token in tokens.items() if any(part in name for part in NAMING_NO_TEXT)}
    return idle - {tokens.get(name) for name in ("bos_token", "eos_token", "unk_token")}


# --- what comes at the end ----------------------------------------------------------------------------------------
def _check_saving(student: Student, key: str, skeleton: Any, tokenizer: Any) -> None:
    """`skeleton`: None where an adapter is saved, which takes nothing but the tokenizer along."""
    from deltaray.model_files.folder import fetch
    from deltaray.train.saving import try_writing

    try:
        source = fetch(student.model, student.revision, weights=False)
    except Exception as error:  # the hub's own errors and those of the network below it
        raise UserError(f"{key}.model: the files of {student.model} cannot be fetched: {first_line(error)}") from None
    try_writing(skeleton, tokenizer, student, source, key)
