"""Other weights for a running engine, inside vLLM: full models of the same shape, LoRA adapters on top of one."""

from typing import Any

from deltaray.generate.engine_settings import COSMETIC, EngineSettings


def load_weights(engine: Any, spec: EngineSettings, model: str) -> None:
    """Puts the weights of `model` into an engine without requests; raises what vLLM raises, with a mixture left."""
    engine.collective_rpc("reload_weights", kwargs={"weights_path": model})
    if spec.gpus == 0:
        engine.collective_rpc(_repack_tied_head)
    if not engine.reset_prefix_cache():  # it holds keys and values of the old weights
        raise RuntimeError("vLLM would not empty its prefix cache")


def _repack_tied_head(worker: Any) -> None:
    """Mends vLLM 0.32's reload on CPU for models whose output layer shares the embedding's weights.

    Linear layers on CPU multiply with a packed copy of their weights. A tied output layer has no weights of its own
    in the checkpoint, so the reload does not pack it again, and it would silently go on with the old model's.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def check_same_model(spec: EngineSettings, model: str) -> None:
    """ValueError unless `model` has the engine's config, so that its weights fit.

    vLLM only warns of weights that it misses, which would leave a mixture of two models.
    """
    from transformers import AutoConfig

    if spec.engine_kwargs.get("revision"):
        raise ValueError(f"{spec.model}: with a pinned revision an engine cannot load other weights and come back")
    if spec.adapters:
        raise ValueError(f"{spec.model}: an engine with LoRA adapters cannot load other weights under them")
    trust = bool(spec.engine_kwargs.get("trust_remote_code"))
    ours, theirs = (AutoConfig.from_pretrained(name, trust_remote_code=trust).to_dict() for name in (spec.model, model))
    keys = (ours.keys() | theirs.keys()) - COSMETIC
    different = sorted(key for key in keys if ours.get(key) != theirs.get(key))
    if different:
        what = ", ".join(different)
        raise ValueError(f"the weights of {model} do not fit an engine of {spec.model}: {what} differ")


class Adapters:
    """The LoRA adapters of one engine, each loaded before its first request: a bad one must not break a batch."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.loaded: dict[str, Any] = {}

    def request(self, folder: str | None) -> Any:
        """vLLM's LoRARequest, None for no adapter. ValueError where the adapter does not fit the model."""
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        if folder is None or folder in self.loaded:
            return self.loaded.get(folder or "")
        # The name tells the prefix caches of two adapters apart, so it is the whole path.
        request = LoRARequest(lora_name=folder, lora_int_id=len(self.loaded) + 1, lora_path=folder)
        try:
            self.engine.add_lora(request)
        except EngineDeadError:
            raise
        except Exception as error:
            raise ValueError(f"adapter {folder}: {error}") from error
        self.loaded[folder] = request
        return request
