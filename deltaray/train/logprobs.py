"""Log-probabilities of responses under a causal language model, without ever holding [tokens x vocabulary] floats.

One module serves training and the reference pass, so that the two agree: the loss of step 0 is exactly ln 2.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaray.train.attention import PACKED
from deltaray.train.attention_layout import Layout
from deltaray.train.head import Head

CHUNK = 1 << 26
"""Logits that exist at a time: a quarter of a GiB of float32."""

COPIES = 4
"""How many of them a model's own soft caps and scales may hold at once."""


class ResponseLogProbs(nn.Module):
    """Wraps a causal language model; the root module that DeepSpeed gets."""

    def __init__(self, model: Any, chunk: int = CHUNK) -> None:
        super().__init__()
        self.model = model
        self.head = SelectedLogProbs(Head(model), chunk)
        self.own_attention: str = model.config._attn_implementation

    def take(self, packed: bool) -> None:
        """Makes the model take packed rows, or padded ones with its own attention."""
        wanted = PACKED if packed else self.own_attention
        if self.model.config._attn_implementation != wanted:
            self.model.set_attn_implementation(wanted)

    def forward(
        self,
        input_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        lengths: Tensor,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Sums of the responses' token log-probabilities in nats, float32 [R]; the arguments are those of `Inputs`."""
        packed = {} if layout is None else {"position_ids": position_ids, "layout": layout}
        found = self.head.own.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packed)
        values = self.head(found.last_hidden_state.flatten(0, 1)[predictors], targets)
        # Sums over ranges, not index_add, which would be non-deterministic on GPUs.
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


class SelectedLogProbs(nn.Module):
    """What follows the decoder, applied in chunks.

    A module of its own so that ZeRO 3 gathers the weights once per pass, not once per chunk, and so that workers with
    different numbers of chunks still make the same collective calls: the weights (`own.parameters`) have to be
    registered as this module's external parameters.
    """

    def __init__(self, own: Head, chunk: int) -> None:
        super().__init__()
        self.own, self.chunk = own, chunk

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities, float32 [N], of targets [N] given hidden states [N, H]."""
        layer: Any = self.own.layer
        vocabulary = layer.weight.shape[0]
        at_once = max(1, self.chunk // vocabulary // (1 if self.own.plain else COPIES))
        if len(targets) <= at_once:
            return self._log_probs(hidden, targets)
        parts = []
        for start in range(0, len(targets), at_once):
            chunk = slice(start, start + at_once)
            # Logits are computed again in the backward pass instead of being kept for it.
            parts.append(checkpoint(self._log_probs, hidden[chunk], targets[chunk], use_reentrant=False))
        return torch.cat(parts)

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        layer: Any = self.own.layer
        plain = self.own.plain
        logits = nn.functional.linear(hidden, layer.weight, layer.bias) if plain else self.own.logits(hidden)
        logits = logits.float()
        return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)
