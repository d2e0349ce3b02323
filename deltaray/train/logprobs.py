"""Log-probabilities of responses under a causal language model, without ever holding [tokens x vocabulary] floats.

One module serves training and the reference pass, so that the two agree: the loss of step 0 is exactly ln 2.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at a time: 1,024 x 128,000 float32 are half a GiB."""

RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings of models that do more to their logits than a matrix product; None or 1 means that they do not."""


class ResponseLogProbs(nn.Module):
    """Wraps a causal language model; the root module that DeepSpeed gets.

    Raises:
        ValueError: the model's logits are more than its output layer's matrix product.
    """

    def __init__(self, model: Any, chunk_tokens: int = CHUNK_TOKENS) -> None:
        super().__init__()
        changed = [key for key in RESCALED if getattr(model.config, key, None) not in (None, 1, 1.0)]
        if changed:
            raise ValueError(f"models that rescale their logits are not supported (config.{changed[0]})")
        self.model = model
        self.head = SelectedLogProbs(chunk_tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(sums of response tokens' log-probabilities in nats, numbers of response tokens): float32 [B], int64 [B].

        All inputs are [B, T], padded on the right; response_mask is true where a token belongs to the response.
        """
        hidden = self.model.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        predicted = response_mask[:, 1:].bool()  # the token at t is predicted by the hidden state at t - 1
        values = self.head(hidden[:, :-1][predicted], input_ids[:, 1:][predicted], self.model.get_output_embeddings())
        # Rows are put back and summed as a whole: index_add would be non-deterministic on GPUs.
        table = torch.zeros(predicted.shape, dtype=torch.float32, device=values.device)
        return table.masked_scatter(predicted, values).sum(dim=1), predicted.sum(dim=1)


class SelectedLogProbs(nn.Module):
    """The output layer applied in chunks.

    A module of its own so that ZeRO 3 gathers the output layer's weight once per pass, not once per chunk, and so
    that workers with different numbers of chunks still make the same collective calls: the weight has to be
    registered as this module's external parameter.
    """

    def __init__(self, chunk_tokens: int) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden: Tensor, targets: Tensor, layer: nn.Linear) -> Tensor:
        """Log-probabilities, float32 [N], of targets [N] given hidden states [N, H]."""
        weight, bias = layer.weight, layer.bias
        parts = []
        for start in range(0, len(targets), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            # Logits are computed again in the backward pass instead of being kept for it.
            parts.append(checkpoint(_log_probs, hidden[chunk], targets[chunk], weight, bias, use_reentrant=False))
        return torch.cat(parts)


def _log_probs(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)
