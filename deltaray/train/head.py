"""What a model's own forward pass does behind its decoder, applied to chosen hidden states.

Many models do more to their logits than a matrix product: soft caps, scales, norms, a second layer. Instead of knowing
them by name, the model's own forward runs on hidden states that are given instead of computed: a twin of the model, its
decoder replaced by a stub. Nothing of it is registered as a module: DeepSpeed and state_dict see the model alone.
"""

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LARGE = 50.0
"""Size of the logits that are tried: beyond what soft caps let through."""


class Head:
    """The parts of a causal language model that follow its decoder.

    Attributes:
        home: the model whose forward makes the logits (inside a PEFT model, or a wrapper with a vision tower).
        layer: its output layer.
        decoder: the module that turns token ids into hidden states.
        plain: the logits are the output layer's matrix product and nothing more.
        parameters: what is needed behind the decoder, for ZeRO 3 to gather.
    """

    def __init__(self, model: Any) -> None:
        self.layer: nn.Module = model.get_output_embeddings()
        if self.layer is None:
            raise ValueError(f"{type(model).__name__} names no output layer")
        self.home: Any = _home(model, self.layer)
        self.decoder: nn.Module = _decoder(self.home, self.layer)
        self._body = _body(self.home, self.decoder, self.layer)
        self._accepts = inspect.signature(type(self.home).forward).parameters
        self.plain = type(self.layer) is nn.Linear and self._is_plain()
        own = [self.layer] if self.plain else [m for m in _outside(self.home, self._body) if m is not self._body]
        found = {id(p): p for m in own for p in m.parameters(recurse=m is self.layer)}
        self.parameters: list[nn.Parameter] = list(found.values())

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] from hidden states [N, H], by the model's own code."""
        return self._run({self._body: _Stub(self._body, self.decoder, hidden[None])}, len(hidden), hidden.device)

    def _run(self, swapped: dict[nn.Module, nn.Module], count: int, device: torch.device) -> Tensor:
        ids = torch.zeros(1, count, dtype=torch.long, device=device)
        given = {"input_ids": ids, "use_cache": False, "return_dict": True}
        free = any(it.kind is it.VAR_KEYWORD for it in self._accepts.values())
        given = {name: value for name, value in given.items() if free or name in self._accepts}
        found: Any = _twin(self.home, swapped)
        found = found.forward(**given)
        logits: Tensor = (found.logits if hasattr(found, "logits") else found[0])[0]
        return logits

    def _is_plain(self) -> bool:
        """Tried without weights: do hidden states reach the output layer unchanged, and what it gives the end?"""
        weight: Any = self.layer.weight
        vocabulary, width = getattr(weight, "ds_shape", weight.shape)  # ZeRO 3 leaves an empty shape
        place = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 2, width, generator=place).to(weight)
        spy = _Spy((LARGE * torch.randn(1, 2, vocabulary, generator=place)).to(weight), weight)
        try:
            with torch.no_grad():
                stub = _Stub(self._body, self.decoder, hidden)
                found = self._run({self._body: stub, self.layer: spy}, 2, weight.device)
        except Exception:  # whatever it lacks (partitioned weights of another layer), it is more than a product
            return False
        return spy.seen is not None and torch.equal(spy.seen, hidden) and torch.equal(found, spy.given[0].to(found))


def _home(model: nn.Module, layer: nn.Module) -> nn.Module:
    """The innermost transformers model that holds the output layer; modules() lists outer ones first."""
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(x is layer for x in m.modules())]
    return holders[-1] if holders else model


def _decoder(home: Any, layer: nn.Module) -> nn.Module:
    """What transformers calls so, where that is one; else the base model, else the part with the embeddings."""
    embeddings = home.get_input_embeddings()
    parts = [part for part in home.children() if any(x is embeddings for x in part.modules())]
    for found in (home.get_decoder(), home.base_model, *parts):
        if isinstance(found, PreTrainedModel) and all(x is not layer for x in found.modules()):
            return found
    raise ValueError(f"{type(home).__name__} has no decoder apart from its output layer")


def _body(home: nn.Module, decoder: nn.Module, layer: nn.Module) -> nn.Module:
    """The outermost module around the decoder without the output layer: what the model's own forward may call."""
    for child in home.children():
        inside = list(child.modules())
        if any(x is decoder for x in inside):
            return _body(child, decoder, layer) if any(x is layer for x in inside) else child
    raise ValueError(f"{type(home).__name__} holds its decoder where it cannot be found")


def _outside(module: nn.Module, body: nn.Module) -> list[nn.Module]:
    """All modules but those inside the body."""
    found = [module]
    for child in module.children():
        found += [] if child is body else _outside(child, body)
    return found


def _twin(module: nn.Module, swapped: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy that shares all weights, has no hooks (DeepSpeed's would make collective calls), and other parts."""
    if module in swapped:
        return swapped[module]
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            twin.__dict__[name] = OrderedDict()
    twin.__dict__["_modules"] = {
        name: child if child is None else _twin(child, swapped) for name, child in module._modules.items()
    }
    return twin


class _Output:
    """Stands for whatever a decoder returns: hidden states, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class _Stub(nn.Module):
    """Stands for a model's body, and for the decoder inside it."""

    def __init__(self, body: nn.Module, decoder: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        vars(self).update(body=body, decoder_inside=decoder, hidden=hidden)

    def forward(self, *arguments: Any, **named: Any) -> _Output:
        return _Output(self.hidden)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.body, name)
        holds = isinstance(found, nn.Module) and any(x is self.decoder_inside for x in found.modules())
        return self if holds else found


class _Spy(nn.Module):
    """Stands for the output layer: remembers what it gets, and returns what it was given."""

    def __init__(self, given: Tensor, weight: Tensor) -> None:
        super().__init__()
        vars(self).update(given=given, weight=weight, bias=None)
        self.given: Tensor
        self.seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return self.given
