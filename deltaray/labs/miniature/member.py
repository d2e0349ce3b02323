"""A member of a miniature family, whatever its task, and what all members have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from deltaray.labs.miniature.tokenizer import BOS, EOS, MAX_LENGTH, PAD, VOCABULARY_SIZE, vocabulary

Batch = tuple[Tensor, Tensor]
"""Token ids of conversations (batch, length), and the ids of their responses (batch, response length), which end the
conversations; -100 stands where there is nothing to predict."""
Rows = dict[str, list[dict[str, str]]]
"""JSON lines by split: prompts, validation, evaluation."""


@dataclass(frozen=True)
class Training:
    """What all members have in common.  Any change makes cached families stale."""

    batch: int = 64
    matrix_learning_rate: float = 0.02
    """For Muon, which trains the matrices of the blocks in about a third of the steps AdamW needs here."""
    vector_learning_rate: float = 1e-2
    """For AdamW on the embedding and the norms."""
    weight_decay: float = 0.1
    warmup: float = 0.05
    initializer_range: float = 0.12
    rope_theta: float = 100.0
    heads: int = 4
    head_dim: int = 32
    """One that vLLM has CPU kernels for; heads * head_dim may exceed the width of the model."""
    slip: float = 0.01
    habit_spread: float = 1.0


@dataclass(frozen=True)
class SplitSizes:
    """Rows of the three prompt files."""

    prompts: int = 8192
    validation: int = 512
    evaluation: int = 2048


TRAINING = Training()
SPLIT_SIZES = SplitSizes()


@dataclass(frozen=True)
class Member(ABC):
    """One model, by what it is made of."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    steps: int

    @property
    def origin(self) -> str:
        """The member whose name seeds initial weights and corpus."""
        return self.name

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens after which an answer that goes on is cut by default."""

    @property
    def last_step(self) -> int:
        """After which training ends; the learning rate decays over `steps`."""
        return self.steps

    def rng(self, seed: int, purpose: int) -> np.random.Generator:
        """The random numbers of one purpose; the corpus of every member is its own."""
        return np.random.default_rng([seed, purpose, *self.origin.encode()])

    def config(self, training: Training) -> PreTrainedConfig:
        """A Llama small enough to train in seconds."""
        return LlamaConfig(**self.shape(training))

    def shape(self, training: Training) -> dict[str, Any]:
        """What the configurations of all architectures have in common."""
        table = vocabulary()
        return {
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": training.heads,
            "num_key_value_heads": training.heads,
            "head_dim": training.head_dim,
            "max_position_embeddings": MAX_LENGTH,
            "tie_word_embeddings": True,
            "initializer_range": training.initializer_range,
            "rope_parameters": {"rope_type": "default", "rope_theta": training.rope_theta},
            "bos_token_id": table[BOS],
            "eos_token_id": table[EOS],
            "pad_token_id": table[PAD],
            "dtype": "float32",
        }

    @abstractmethod
    def batches(self, seed: int, training: Training) -> Iterator[Batch]:
        """Freshly written conversations, for ever."""

    @abstractmethod
    def rows(self) -> Rows:
        """The prompts of its task: the same for every seed and every member that has it."""
