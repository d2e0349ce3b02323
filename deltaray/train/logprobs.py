"""Log-probabilities of responses under a causal language model, without ever holding [tokens x vocabulary] floats.

One module serves training and the reference pass, so that the two agree: the loss of step 0 is exactly ln 2.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaray.train.layout import Layout

CHUNK = 1 << 26
"""Logits that exist at a time: a quarter of a GiB of float32."""

RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings of models that do more to their logits than a matrix product; None or 1 means that they do not."""


class ResponseLogProbs(nn.Module):
    """Wraps a causal language model; the root module that DeepSpeed gets.

    Raises:
        ValueError: the model's logits are more than its output layer's matrix product.
    """

    def __init__(self, model: Any, chunk: int = CHUNK) -> None:
        super().__init__()
        changed = [key for key in RESCALED if getattr(model.config, key, None) not in (None, 1, 1.0)]
        if changed:
            raise ValueError(f"models that rescale their logits are not supported (config.{changed[0]})")
        self.model = model
        self.head = SelectedLogProbs(chunk)

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
        hidden = self.model.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packed
        ).last_hidden_state.flatten(0, 1)
        values = self.head(hidden[predictors], targets, self.model.get_output_embeddings())
        # Sums over ranges, not index_add, which would be non-deterministic on GPUs.
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


class SelectedLogProbs(nn.Module):
    """The output layer applied in chunks.

    A module of its own so that ZeRO 3 gathers the output layer's weight once per pass, not once per chunk, and so
    that workers with different numbers of chunks still make the same collective calls: the weight has to be
    registered as this module's external parameter.
    """

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, hidden: Tensor, targets: Tensor, layer: nn.Linear) -> Tensor:
        """Log-probabilities, float32 [N], of targets [N] given hidden states [N, H]."""
        weight, bias = layer.weight, layer.bias
        at_once = max(1, self.chunk // weight.shape[0])
        if len(targets) <= at_once:
            return _log_probs(hidden, targets, weight, bias)
        parts = []
        for start in range(0, len(targets), at_once):
            chunk = slice(start, start + at_once)
            # Logits are computed again in the backward pass instead of being kept for it.
            parts.append(checkpoint(_log_probs, hidden[chunk], targets[chunk], weight, bias, use_reentrant=False))
        return torch.cat(parts)


def _log_probs(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)
